"""The static step that a CUDA graph is made of (imtx/graph.py), on the CPU: pictures, parameters, and what a graph forbids.

A stand-in for CUDA keeps a graph's rules: a capture runs nothing, and a replay repeats what was captured.
"""

import contextlib
import copy
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import FAMILIES, KINDS, LAYOUTS, SIZE, conditions, pictures, pictures_for, select, small
from imtx import ImageTransformer, draw, graph, sample, sampling
from imtx.graph import StaticStep
from imtx.model import Context
from imtx.sampling import noise

PIXELS = SIZE * SIZE
FEW = [KINDS[0], KINDS[3], KINDS[12], KINDS[18]]  # each family, output, layout and task


def build(family: str, output: str, layout: str, task: str) -> ImageTransformer:
    return small(output, task, **FAMILIES[family], **LAYOUTS[layout])


@pytest.fixture(params=KINDS, ids="-".join)
def model(request) -> ImageTransformer:
    return build(*request.param)


@pytest.fixture
def plain() -> ImageTransformer:
    return build("modern", "dmol", "1d", "class")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Several widths a window, also for a picture this small."""
    monkeypatch.setattr(graph, "KEYS", 12)


def static_step(model: ImageTransformer, images: int, temperature: float = 1.0, pixels: Tensor | None = None) -> StaticStep:
    condition = conditions(model, images)
    context = model.context(images, condition.get("labels"), condition.get("sources"))
    pixels = torch.zeros(images, model.config.sub_pixels, dtype=torch.uint8) if pixels is None else pixels.flatten(1).clone()
    return StaticStep(model, context, model.caches(images), noise(model, range(images)), pixels, temperature, 0)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Engine "graph" for models on the CPU: the static step, launched operator by operator."""
    monkeypatch.setattr(sampling, "_engine", lambda model, asked: asked)
    monkeypatch.setattr(graph, "CudaStep", StaticStep)


# ---- the same pictures, the same distribution ---------------------------------------------------------------


def test_pictures_equal_those_of_the_eager_engine(model, on_the_cpu):
    options = dict(temperature=0.6, **conditions(model, 3))
    assert torch.equal(draw(model, [0, 1, 2], engine="graph", **options), draw(model, [0, 1, 2], engine="eager", **options))


@pytest.mark.parametrize("given_pixels", [1, 16, 37, PIXELS - 1, PIXELS])
@pytest.mark.parametrize("kind", FEW, ids="-".join)
def test_completions_equal_those_of_the_eager_engine(kind, given_pixels, on_the_cpu):
    model = build(*kind)
    options = conditions(model, 2) | dict(given=pictures(2, seed=5), given_pixels=given_pixels, every=5)
    ours, theirs = (list(sample(model, [3, 4], engine=engine, **options)) for engine in ("graph", "eager"))
    assert [s.done for s in ours] == [s.done for s in theirs]
    for one, other in zip(ours, theirs):
        assert torch.equal(one.pixels, other.pixels)


def test_parameters_equal_the_parallel_forward(model):
    pixels, condition = pictures_for(model, 3), conditions(model, 3)
    drawing, found = static_step(model, 3, pixels=pixels), []
    parameters = drawing.parameters
    drawing.parameters = lambda keys: found.append(parameters(keys)) or found[-1]
    for step in range(model.config.positions):
        drawing.pixels.copy_(pixels.view(drawing.pixels.shape))  # what is drawn is not what the next step is to see
        drawing.advance(step)
    torch.testing.assert_close(torch.stack(found, dim=1), model(pixels, **condition), rtol=0, atol=1e-9)


def test_an_image_is_the_same_in_any_batch(plain, on_the_cpu):
    condition = conditions(plain, 3)
    together = draw(plain, [4, 5, 6], engine="graph", **condition)
    for i in range(3):
        alone = draw(plain, [4 + i], engine="graph", **select(condition, slice(i, i + 1)))
        assert torch.equal(alone, together[i : i + 1])


def test_it_draws_for_a_caller_in_inference_mode(plain, on_the_cpu):
    with torch.inference_mode():
        found = draw(plain, [0], engine="graph")
    assert torch.equal(found, draw(plain, [0], engine="eager")) and not torch.is_inference_mode_enabled()


def test_autocast_is_left_to_training(plain, on_the_cpu):
    plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = draw(plain, [0], engine="graph")
    assert torch.equal(found, draw(plain, [0], engine="graph"))


def test_no_more_keys_are_read_than_a_width_beyond_those_that_are_seen(model):
    drawing, layout = static_step(model, 1), model.layout
    for step in range(model.config.positions):
        block = step // layout.query_block
        seen = len(layout.memory_steps(block)) + step % layout.query_block + 1
        keys = drawing.enter(step)
        assert seen <= keys < seen + graph.KEYS and keys <= drawing.width


# ---- what a graph forbids -----------------------------------------------------------------------------------

FORBIDDEN = {  # what looks at numbers, or has a shape that depends on them
    torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.is_nonzero, torch.ops.aten.equal,
    torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2, torch.ops.aten.repeat_interleave,
    torch.ops.aten.lift_fresh, torch.ops.aten.scalar_tensor,  # and what brings numbers of the host
}


class Record(TorchDispatchMode):
    """Every operator that is called: its name, shapes and scalars, and the addresses of tensors that are `kept`."""

    def __init__(self, kept: list[Tensor]):
        super().__init__()
        self.kept, self.calls, self.devices = {t.untyped_storage()._cdata for t in kept}, [], set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.overloadpacket not in FORBIDDEN, f"{operator} is not for a graph"
        indices = args[1] if operator.overloadpacket is torch.ops.aten.index else ()
        assert all(i is None or i.dtype == torch.int64 for i in indices), "an index by a mask"
        leaves = tree_leaves((args, kwargs))
        self.devices |= {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        self.calls.append((str(operator), *(self.describe(leaf) for leaf in leaves)))
        return operator(*args, **(kwargs or {}))

    def describe(self, leaf):
        if not isinstance(leaf, Tensor):
            return str(leaf)
        kept = leaf.untyped_storage()._cdata in self.kept
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.data_ptr() if kept else None


def persistent(drawing: StaticStep) -> list[Tensor]:
    """All tensors that outlive a step."""
    own = [t for t in tree_leaves(list(vars(drawing).values())) if isinstance(t, Tensor)]
    caches = [t for cache in drawing.caches for t in (cache.all, cache.window)]
    context = [t for t in tree_leaves(list(vars(drawing.context).values())) if isinstance(t, Tensor)]
    return own + caches + context + list(drawing.model.parameters()) + list(drawing.model.buffers())


def test_every_step_of_a_width_calls_the_same_operators_on_the_same_addresses(model):
    drawing, first = static_step(model, 2, temperature=0.7), {}
    kept = persistent(drawing)
    addresses = [t.data_ptr() for t in kept]
    for step in range(0, model.config.positions, 5):  # what is skipped would change numbers, which do not matter here
        drawing.step.fill_(step)
        keys = drawing.enter(step)
        with Record(kept) as record:
            drawing.run(keys)
        assert [t.data_ptr() for t in persistent(drawing)] == addresses
        assert first.setdefault(keys, record.calls) == record.calls, f"step {step} is not what was captured"
    assert len(first) == -(-drawing.width // graph.KEYS)


def elsewhere(value):
    """On the device "meta", where there are shapes and no numbers: what would look at one fails."""
    if isinstance(value, (list, tuple)):
        return type(value)(elsewhere(v) for v in value)
    return value.to("meta") if isinstance(value, Tensor) else value


def test_all_that_a_step_reads_lies_on_the_models_device(model, monkeypatch):
    """A number from the CPU would be copied, which a capture refuses."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which "meta" does not have
    drawing = static_step(model, 2, temperature=0.7)
    drawing.model = copy.deepcopy(model).to("meta")
    drawing.context = Context(**{name: elsewhere(value) for name, value in vars(drawing.context).items()})
    for part in (drawing, *drawing.caches):
        for name, value in vars(part).items():
            if name != "caches":
                setattr(part, name, elsewhere(value))
    with Record([]) as record:
        drawing.run(graph.KEYS)
    assert record.devices == {"meta"}


# ---- recording and playing back -----------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch) -> SimpleNamespace:
    """A stand-in: a capture runs nothing, a replay runs what was captured, nothing else runs during a capture."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other) -> None:
            assert other is not self

    here = Stream()
    said = SimpleNamespace(capturing=None, stream=here, log=[])  # log: what was done, for how many keys, on which stream
    run = StaticStep.run

    def observed(self, keys: int) -> None:
        if said.capturing is None:
            said.log.append(("run", keys, said.stream))
            run(self, keys)
        else:
            said.log.append(("capture", keys, said.stream))
            said.capturing.replay = lambda: said.log.append(("replay", keys, said.stream)) or run(self, keys)

    @contextlib.contextmanager
    def on(stream):
        said.stream, before = stream, said.stream
        yield
        said.stream = before

    @contextlib.contextmanager
    def capture(recorded, *, pool, stream, capture_error_mode):
        assert said.capturing is None and capture_error_mode == "thread_local"
        said.capturing = recorded
        time.sleep(0.002)  # another visitor would run now
        with on(stream):
            yield
        said.capturing = None

    monkeypatch.setattr(StaticStep, "run", observed)
    for name, value in dict(
        Stream=Stream, current_stream=lambda: said.stream, stream=on, graph=capture,
        device=lambda device: contextlib.nullcontext(), CUDAGraph=SimpleNamespace, graph_pool_handle=str,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sampling, "_engine", lambda model, asked: asked)
    return said


@pytest.mark.parametrize("given_pixels", [0, 21, PIXELS])
@pytest.mark.parametrize("kind", FEW, ids="-".join)
def test_a_graph_a_width_is_captured_once_and_played_back(kind, cuda, given_pixels):
    model = build(*kind)
    options = conditions(model, 2) | (dict(given=pictures(1)[0], given_pixels=given_pixels) if given_pixels else {})
    drawn = draw(model, [0, 1], engine="graph", **options)
    log = list(cuda.log)
    assert torch.equal(drawn, draw(model, [0, 1], engine="eager", **options))
    first = [i for i, (name, _, _) in enumerate(log) if name == "run"]
    widths = [log[i][1] for i in first]
    assert len(set(widths)) == len(widths)
    for i in first:  # the first step of a width runs, and is captured next, on a stream of its own
        assert log[i + 1] == ("capture", *log[i][1:]) and log[i][2] is not cuda.stream
    rest = [entry for i, entry in enumerate(log) if i not in first and i - 1 not in first]
    assert all(name == "replay" and keys in widths and stream is cuda.stream for name, keys, stream in rest)
    assert len(first) + len(rest) == (PIXELS - given_pixels) * model.config.channels


def test_nothing_runs_while_another_visitor_captures(plain, cuda):
    wanted = [draw(plain, [seed], engine="eager") for seed in range(3)]
    drawn = {}

    def visit(seed: int) -> None:
        drawn[seed] = draw(plain, [seed], engine="graph")  # two captures at once would fail, or swallow a step

    visitors = [threading.Thread(target=visit, args=[seed]) for seed in range(3)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert all(torch.equal(drawn[seed], wanted[seed]) for seed in range(3))


# ---- engines ------------------------------------------------------------------------------------------------


def test_without_a_cuda_device_the_engine_is_refused(plain):
    with pytest.raises(ValueError) as error:
        sample(plain, [0], engine="graph")
    assert str(error.value) == "The graph engine needs a CUDA device, and the model is on cpu. Leave engine out."


@pytest.mark.parametrize("device, asked, chosen", [
    ("cuda", None, "eager"), ("cuda", "graph", "graph"), ("cuda", "eager", "eager"), ("cpu", None, "compiled"),
    ("cpu", "eager", "eager"), ("mps", "eager", "eager"),
])
def test_a_model_on_a_cuda_device_is_drawn_by_graphs_if_asked(device, asked, chosen, monkeypatch):
    weight = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    monkeypatch.setattr("imtx.fast.is_warm", lambda model: True)  # nothing is to be compiled
    assert sampling._engine(SimpleNamespace(head=SimpleNamespace(weight=weight)), asked) == chosen


def test_on_a_cuda_device_the_compiled_engine_is_refused():
    weight = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    with pytest.raises(ValueError, match="The compiled engine cannot draw: the model is on cuda:0"):
        sampling._engine(SimpleNamespace(head=SimpleNamespace(weight=weight)), "compiled")


if torch.cuda.is_available():  # else there is nothing to skip, which CI=true would not have

    @pytest.mark.parametrize("given_pixels", [0, 21])
    def test_on_a_gpu(model, given_pixels):
        model, options = model.to("cuda"), {name: t.to("cuda") for name, t in conditions(model, 3).items()}
        options |= dict(given=pictures(1)[0], given_pixels=given_pixels) if given_pixels else {}
        assert torch.equal(draw(model, [0, 1, 2], engine="graph", **options), draw(model, [0, 1, 2], engine="eager", **options))
