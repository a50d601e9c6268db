"""Drawing on a GPU: the step of imtx/model.py as a CUDA graph, recorded once and played back for every position.

A step of a small model is hundreds of small kernels, and launching them one by one from Python takes longer than they do. A
graph is launched as one, but it repeats itself to the letter: the same kernels, on the same addresses, with nothing that the
host decides or waits for. `StaticStep` is the step under these terms. It runs on any device, which is how it is tested;
`CudaStep` records it and plays it back.

N images, P positions in generation order, d width, H heads of D features, L layers; query blocks of Q positions with memory
blocks of at most M, W = M + Q.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Cache
from .model import Context, ImageTransformer

KEYS = 128  # attention reads the window in multiples of so many keys; each multiple is a graph of its own

# While one thread captures, no other is to give the GPU work, says PyTorch: two visitors take turns, step by step.
_one_at_a_time = threading.Lock()


class StaticStep:
    """Draws position after position: `advance(step)` for each step from `start` on, in order.

    pixels: (copies N, sub-pixels) uint8 in raster order; what is drawn is written into it. caches: those of `model.caches`;
    with a given prefix, filled by the parallel forward. uniforms: (N, P, draws a position) float64.

    What differs from step to step is read by a tensor that holds the step's number, from tables that have a row a step. The
    host has two things left to do, as it knows that number too: it moves the window on when a query block begins, outside of
    the graph, and it says how much of the window is to be read.
    """

    def __init__(
        self, model: ImageTransformer, context: Context, caches: list[Cache], uniforms: Tensor, pixels: Tensor,
        temperature: float, start: int,
    ):
        self.model, self.context, self.caches, self.temperature = model, context, caches, temperature
        layout, weight, positions = model.layout, model.head.weight, model.config.positions
        self.uniforms, self.pixels = uniforms, pixels.view(len(pixels), positions, -1)  # (N, P, width)
        self.step = torch.tensor([start], device=weight.device)
        # Which steps a window holds: the memory block's, then the block's own, then step 0 for what stays empty.
        own = torch.arange(positions).view(layout.blocks, layout.query_block)
        steps = torch.cat([layout.memory, own], dim=1)  # (B, W)
        steps = steps.gather(1, (steps < 0).byte().argsort(dim=1, stable=True)).clamp(min=0)
        self.window_steps, self.width = steps.to(weight.device), steps.shape[1]
        self.lengths = (layout.memory >= 0).sum(dim=1).tolist()  # (B,): of the memory blocks
        places = torch.tensor(self.lengths)[:, None] + torch.arange(layout.query_block)  # (B, Q)
        self.places = places.flatten().to(weight.device)  # (P,): where in the window a step lies; it sees no further
        self.slots = torch.arange(self.width, device=weight.device)  # (W,)
        self.zeros = weight.new_zeros(1, self.width)
        self.block = -1  # the query block that the windows belong to
        self.turns = self._turns() if model.config.family == "modern" else ()

    def _turns(self) -> tuple[Tensor, Tensor]:
        """Two tables (P, L, 2, 1, D) that turn normalised queries and keys, and scale them by their norms' weights.

        rotate(w x) in imtx/attention.py is (w x) cos + roll(w x) sin, with cos = [cos, cos], sin = [-sin, sin] and a roll by
        half of D: x (w cos) + roll(x) (roll(w) sin). With the weights in the tables, three kernels turn the queries and keys
        of a layer in place of fourteen, and at batch 1 the number of kernels is what a step takes.
        """
        model = self.model
        attentions = [block.attention for block in model.decoder]
        weights = torch.stack([torch.stack([a.query_norm.weight, a.key_norm.weight]) for a in attentions])  # (L, 2, D)
        cos, sin = (t.to(weights.dtype) for t in (model.cos, model.sin))  # (P, D / 2)
        cos, sin = torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)
        tables = cos[:, None, None] * weights, sin[:, None, None] * weights.roll(weights.shape[2] // 2, dims=2)
        return tuple(table.unsqueeze(3) for table in tables)

    # ---- the host's part ------------------------------------------------------------------------------------

    def advance(self, step: int) -> None:
        self.run(self.enter(step))

    def enter(self, step: int) -> int:
        """Moves the windows on to the query block of this step; returns how many keys `run` is to read."""
        size = self.model.layout.query_block
        block, inside = divmod(step, size)
        if block != self.block:
            for cache in self.caches:
                if self.block >= 0:  # until it is done, a block's own keys lie in the window alone
                    first, length = self.block * size, self.lengths[self.block]
                    cache.all[:, :, :, first : first + size] = cache.window[:, :, :, length : length + size]
                torch.index_select(cache.all, 3, self.window_steps[block], out=cache.window)
            self.block = block
        seen = self.lengths[block] + inside + 1
        return min(-(-seen // KEYS) * KEYS, self.width)

    # ---- the graph's part: no number of a tensor is looked at, no shape or address depends on one -----------

    def run(self, keys: int) -> None:
        """One step: its pixel or sub-pixel is drawn and written down, and the step's number goes up."""
        with torch.autocast(self.pixels.device.type, enabled=False):
            output = self.model.output
            params = output.temper(self.parameters(keys), self.temperature)
            colours = output.draw(params, self.uniforms.index_select(1, self.step).squeeze(1))  # (N, width)
            position = self.model.order.index_select(0, self.step)
            self.pixels.index_copy_(1, position, colours.repeat(self.context.copies, 1).unsqueeze(1))
            self.step += 1

    def parameters(self, keys: int) -> Tensor:
        """`model.step`: the distribution of the position, (N, output parameters)."""
        model, context, step = self.model, self.context, self.step
        x, guess = model.embed(self.pixels.flatten(1), context, step)  # indexes its tables with a tensor as with a slice
        rotary = model.rotary(step)
        place = self.places.index_select(0, step)
        mask = self.zeros[:, :keys].masked_fill(self.slots[:keys] > place, -torch.inf)  # (1, keys): added to the scores
        turns = [table.index_select(0, step) for table in self.turns]  # (1, L, 2, 1, D) each
        for i, block in enumerate(model.decoder):
            x = block.residual(x, block.attention_norm, lambda x: self._attend(i, x, place, mask, turns))
            if context.source_kv:
                x = block.residual(x, block.source_norm, lambda x: block.source_attention(x, rotary, context.source_kv[i]))
            x = block.residual(x, block.ffn_norm, block.ffn)
        return model.parameters_of(x, guess, context).squeeze(1)

    def _attend(self, i: int, x: Tensor, place: Tensor, mask: Tensor, turns: list[Tensor]) -> Tensor:
        """`LocalSelfAttention.step` of layer i: (N, 1, d) -> (N, 1, d)."""
        attention, window = self.model.decoder[i].attention, self.caches[i].window  # (2, N, H, W, D)
        qkv = attention.qkv(x).unflatten(-1, (3, attention.heads, -1))  # (N, 1, 3, H, D)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if turns:
            cos, sin = (turn[:, i] for turn in turns)  # (1, 2, 1, D)
            qk = F.rms_norm(qk, qk.shape[-1:], eps=attention.query_norm.eps)
            qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, dims=-1), sin)
        q, k = (t.transpose(1, 2) for t in qk.unbind(2))  # (N, H, 1, D)
        window[0].index_copy_(2, place, k)
        window[1].index_copy_(2, place, v.transpose(1, 2))
        k, v = window[:, :, :, : mask.shape[1]]
        return attention.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class CudaStep(StaticStep):
    """The same, recorded: a graph for each number of keys that `enter` returns, W / KEYS of them, rounded up.

    They are recorded anew for each call of `sample`, whose addresses, batch and temperature they hold. For each the step is
    launched twice kernel by kernel, once to run and once to be recorded, and the host waits for the GPU in between.

    Not made in inference mode: PyTorch's graphs share a state that stays in the mode of a process's first capture (its issue
    166792), and a trainer that captures later, outside of that mode, would fail.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.stream, self.pool = torch.cuda.Stream(self.pixels.device), torch.cuda.graph_pool_handle()

    def advance(self, step: int) -> None:
        with _one_at_a_time, torch.cuda.device(self.pixels.device):
            keys = self.enter(step)
            if keys in self.graphs:
                self.graphs[keys].replay()
                return
            # A library sets itself up when a thread first uses it, on the stream where it does, and must not do so in a
            # capture. So the first step of a width runs as it is, on the stream and in the thread that capture next.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.run(keys)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a copy to the CPU in another visitor's thread is no error of this capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self.run(keys)  # recorded, not run: what this writes is written by the next step's replay
            self.graphs[keys] = graph
