"""What the compiled step is made of: products with matrices, norms, exponentials. Numba compiles these loops.

A sum over the rows of a matrix runs from the first row to the last, one multiply-add after another, whatever the number of
images that are worked on together: so an image comes out the same, to the last bit, in any batch. The loops inside run
along a row, where memory is contiguous, and become vector instructions.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .compiling import compiled

EPSILON = np.finfo(np.float32).eps  # torch.nn.RMSNorm's own
kernel = compiled("contract")  # a multiply and an add are one instruction; sums keep their order
inlined = compiled("contract", forceinline=True)  # for what takes many arrays, as handing them over takes its time
reordered = compiled("contract", "reassoc", "nsz", "nnan", "ninf")  # for norms: sums along a row in any fixed order


def widen(weight):
    """A stored weight as float32: bfloat16, which numpy has not, is kept as the upper 16 bits of a float32."""
    raise NotImplementedError("for compiled code only")


@overload(widen, inline="always")
def _widen(weight):
    if weight == types.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << 16).view(np.float32)
    return lambda weight: weight


@kernel
def copy(x, y):
    """y = x. An assignment to a whole slice would do, if its checks did not take seconds to compile."""
    for i in range(len(y)):
        y[i] = x[i]


@kernel
def add_product(x, matrix, y, rows, columns):
    """y[:columns] += x[:rows] @ matrix[:rows, :columns]; eight rows in one go, so that y is read and written less often."""
    whole = rows - rows % 8
    for i in range(0, whole, 8):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        x4, x5, x6, x7 = x[i + 4], x[i + 5], x[i + 6], x[i + 7]
        m0, m1, m2, m3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        m4, m5, m6, m7 = matrix[i + 4], matrix[i + 5], matrix[i + 6], matrix[i + 7]
        for j in range(columns):
            total = y[j]
            total += x0 * widen(m0[j])
            total += x1 * widen(m1[j])
            total += x2 * widen(m2[j])
            total += x3 * widen(m3[j])
            total += x4 * widen(m4[j])
            total += x5 * widen(m5[j])
            total += x6 * widen(m6[j])
            total += x7 * widen(m7[j])
            y[j] = total
    for i in range(whole, rows):
        x0, m0 = x[i], matrix[i]
        for j in range(columns):
            y[j] += x0 * widen(m0[j])


@kernel
def add_products_of_4(x, matrix, y, rows, columns):
    """The same for four images, x (4, rows) and y (4, columns), which share each weight that is read and widened."""
    xa, xb, xc, xd = x[0], x[1], x[2], x[3]
    ya, yb, yc, yd = y[0], y[1], y[2], y[3]
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        m0, m1, m2, m3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        a0, a1, a2, a3 = xa[i], xa[i + 1], xa[i + 2], xa[i + 3]
        b0, b1, b2, b3 = xb[i], xb[i + 1], xb[i + 2], xb[i + 3]
        c0, c1, c2, c3 = xc[i], xc[i + 1], xc[i + 2], xc[i + 3]
        d0, d1, d2, d3 = xd[i], xd[i + 1], xd[i + 2], xd[i + 3]
        for j in range(columns):
            w0, w1, w2, w3 = widen(m0[j]), widen(m1[j]), widen(m2[j]), widen(m3[j])
            total = ya[j]
            total += a0 * w0
            total += a1 * w1
            total += a2 * w2
            total += a3 * w3
            ya[j] = total
            total = yb[j]
            total += b0 * w0
            total += b1 * w1
            total += b2 * w2
            total += b3 * w3
            yb[j] = total
            total = yc[j]
            total += c0 * w0
            total += c1 * w1
            total += c2 * w2
            total += c3 * w3
            yc[j] = total
            total = yd[j]
            total += d0 * w0
            total += d1 * w1
            total += d2 * w2
            total += d3 * w3
            yd[j] = total
    for i in range(whole, rows):
        m0 = matrix[i]
        a0, b0, c0, d0 = xa[i], xb[i], xc[i], xd[i]
        for j in range(columns):
            w0 = widen(m0[j])
            ya[j] += a0 * w0
            yb[j] += b0 * w0
            yc[j] += c0 * w0
            yd[j] += d0 * w0


@kernel
def add_products(x, matrix, y):
    """y (N, columns) += x (N, rows or more) @ matrix (rows, columns), of N images."""
    images, (rows, columns) = len(x), matrix.shape
    fours = images - images % 4
    for n in range(0, fours, 4):
        add_products_of_4(x[n : n + 4], matrix, y[n : n + 4], rows, columns)
    for n in range(fours, images):
        add_product(x[n], matrix, y[n], rows, columns)


@reordered
def over_rms(x, start, count):
    """1 / rms(x) over `count` features from `start` on, as torch.nn.RMSNorm has it in float32."""
    total = np.float32(0)
    for i in range(count):
        total += x[start + i] * x[start + i]
    return np.float32(1) / np.sqrt(total / np.float32(count) + EPSILON)


@kernel
def rms_norm(x, gain, y):
    """y = gain x / rms(x); y is not x."""
    scale = over_rms(x, 0, len(x))
    for i in range(len(x)):
        y[i] = x[i] * scale * gain[i]


@reordered
def layer_norm(x, gain, bias, count):
    """x = gain (x - mean) / deviation + bias over its first `count` features, with the paper family's epsilon, 1e-6."""
    total = np.float32(0)
    for i in range(count):
        total += x[i]
    mean, squares = total / np.float32(count), np.float32(0)
    for i in range(count):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.sqrt(squares / np.float32(count) + np.float32(1e-6))
    for i in range(count):
        x[i] = (x[i] - mean) * scale * gain[i] + bias[i]


@compiled("contract", inline="always")
def exp(x):
    """exp of a float32 within 2 units in the last place, in steps that vectorise (Cephes' polynomial); no NaN comes in."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    return p * np.uint32(np.int32(np.int32(n) + 127) << 23).view(np.float32)


@reordered
def exponentials(x, count):
    """x = exp(x - max x) over its first `count` numbers; returns their sum: a softmax that is yet to be divided by it."""
    highest = x[0]
    for i in range(count):
        highest = max(highest, x[i])
    total = np.float32(0)
    for i in range(count):
        x[i] = exp(x[i] - highest)
        total += x[i]
    return total


@kernel
def swiglu(up, count):
    """up (2 count) = [gate, value]: its first half becomes silu(gate) value."""
    for i in range(count):
        up[i] = up[i] / (np.float32(1) + exp(-up[i])) * up[count + i]


@kernel
def relu(x, count):
    for i in range(count):
        x[i] = max(x[i], np.float32(0))
