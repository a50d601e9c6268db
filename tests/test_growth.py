"""A model made deeper (train/growth.py) computes what it did, learns with its new blocks, and is told of in its run."""

import pytest
import torch
from conftest import conditions, pictures, small
from init_fixtures import files, start  # noqa: F401, fixtures

from growth import deepened
from imtx import ImageTransformer, draw


@pytest.mark.parametrize("task", ["class", "unconditional", "sr"])
@pytest.mark.parametrize("output", ["dmol", "categorical"])
def test_a_deeper_model_computes_what_it_did_to_the_last_bit(output, task):
    model = small(output, task).float().eval()
    layers = model.config.layers
    for times in (2, 3):
        deeper = deepened(model, times * layers).eval()
        assert deeper.config.layers == len(deeper.decoder) == times * layers
        condition = conditions(model, 2)
        assert torch.equal(deeper.log_prob(pictures(2), **condition), model.log_prob(pictures(2), **condition))
    assert torch.equal(draw(deeper, [1, 2], **condition), draw(model, [1, 2], **condition))


def test_new_blocks_stand_between_the_old_and_begin_to_learn_at_once():
    model = small("dmol", "sr").float()
    deeper = deepened(model, 2 * model.config.layers)
    for number, block in enumerate(model.decoder):
        old, new = deeper.decoder[2 * number], deeper.decoder[2 * number + 1]
        assert all(torch.equal(old.state_dict()[name], weight) for name, weight in block.state_dict().items())
        assert torch.equal(new.attention.qkv.weight, block.attention.qkv.weight)
    deeper.log_prob(pictures(2), **conditions(model, 2)).sum().backward()
    for block in deeper.decoder[1::2]:
        for last in (block.attention.out, block.source_attention.out, block.ffn.down):
            assert not last.weight.any() and last.weight.grad.any()
    before = model.decoder[0].ffn.up.weight.clone()
    deeper.decoder[0].ffn.up.weight.data += 1
    assert torch.equal(model.decoder[0].ffn.up.weight, before)


@pytest.mark.parametrize("layers", [-2, 0, 1, 2, 3, 10_000])
def test_layers_that_are_no_multiple_are_refused(layers, refusal):
    model = small("dmol", "class", layers=2)
    assert refusal(deepened, model, layers).startswith("--layers must be a multiple of the model's 2 decoder layers, from 4 to ")


def test_a_block_of_the_paper_is_refused(refusal):
    model = small("dmol", "class", family="paper", position_encoding="learned")
    assert "a block of the paper normalises what it hands on" in refusal(deepened, model, 2 * model.config.layers)


def test_a_run_with_layers(start, here, tmp_path, refusal):
    layers = ImageTransformer.from_pretrained("base").config.layers
    result = start("--data", "photos", "--layers", 2 * layers, "--learning-rate", 1e-3)
    model = ImageTransformer.from_pretrained(tmp_path / "run/model")
    assert model.config.layers == 2 * layers and result["steps"] == 2
    assert all(block.ffn.down.weight.any() for block in model.decoder)  # they have learned
    again = ("--data", "photos", "--resume", "latest")
    assert f"this run has --layers {2 * layers}, not no --layers. Go on" in refusal(start, *again, steps=3)
    assert start(*again, "--layers", 2 * layers, steps=3)["steps"] == 3
    start("--data", "photos", output="shallow")
    assert f"this run has no --layers, not --layers {2 * layers}. " in refusal(
        start, *again, "--layers", 2 * layers, output="shallow", steps=3
    )
    (tmp_path / "shallow/run.json").unlink()  # its checkpoints still tell
    assert f"this run has {layers} decoder layers, not {2 * layers}. " in refusal(
        start, *again, "--layers", 2 * layers, output="shallow", steps=3
    )


def test_an_empty_name_is_refused(start, here, capsys):
    with pytest.raises(SystemExit):
        start("--data", "photos", init="")
    assert "--init is empty." in capsys.readouterr().err


def test_layers_go_with_init(start, here, capsys):
    with pytest.raises(SystemExit):
        start("--preset", "tiny", "--data", "photos", "--layers", 4, init=None)
    assert "--layers goes with --init; a preset has its layers." in capsys.readouterr().err
