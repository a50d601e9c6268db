"""Several processes do what one does: training, also cut up by FSDP, evaluation, resuming. Launches that pretend are refused.

The processes are real ones, on CPUs, and talk by gloo. And a disk that is full or must not be written to costs no checkpoint.
"""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import pictures, small
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from test_train import ROOT, altered, assert_equal, data, last_line, run, train, trained, weights, write  # noqa: F401

import checkpoints
import evaluate
from checkpoints import Checkpoints
from imtx import ImageTransformer
from processes import check_sharding, told_by_the_launcher
from report import in_a_sentence

CONFIGS = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "train/configs").glob("*.yaml")}
FSDP = {name.upper(): str(value) for name, value in CONFIGS["fsdp"].fsdp_config.items()}  # as accelerate launch has it


@pytest.fixture
def two(monkeypatch):
    """Runs a script in two processes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return lambda script, *arguments: run(script, *arguments, interpreter=torchrun)


def options(data: Path, output: Path, steps: int = 8) -> tuple:
    return ("--preset", "tiny", "--data", data, "--output", output, "--max-steps", steps, "--every", steps // 2,
            "--validation", 4, "--batch-size", 4, "--warmup", 2)


def figures(run: Path, after: int = 0) -> list[float]:
    """Losses and validations of a run's log, of the steps after that one."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [value for e in entries if e["step"] > after for name, value in e.items() if name.endswith("bits_per_dim")]


# ---- training ----------------------------------------------------------------------------------------------


def test_two_processes_and_parts_of_a_step_do_what_one_process_does(data, trained, two, tmp_path):
    done = last_line(two(data.with_name("small.py"), *options(data, tmp_path / "two"), "--accumulate", 2))
    assert done["num_processes"] == 2
    # Sums in another order, which Muon magnifies; other images would differ by a tenth.
    assert len(figures(trained)) == 5 and figures(tmp_path / "two") == pytest.approx(figures(trained), abs=3e-3)

    (tmp_path / "one").mkdir()
    shutil.copytree(tmp_path / "two/checkpoints/step-00000004", tmp_path / "one/checkpoints/step-00000004")
    assert train(data, tmp_path / "one", "--max-steps", 8, "--resume", "latest")["num_processes"] == 1
    assert figures(tmp_path / "one") == pytest.approx(figures(trained, after=4), abs=3e-3)


def test_two_processes_with_dropout_resume_bit_for_bit(data, two, tmp_path):
    script = altered(tmp_path / "dropout.py", "", dropout=0.2)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert last_line(two(script, *options(data, whole, 4)))["num_processes"] == 2
    first, last = "checkpoints/step-00000002", "checkpoints/step-00000004"
    states = [torch.load(whole / first / f"random_states_{i}.pkl", weights_only=False) for i in range(2)]
    assert not torch.equal(*(state["torch_manual_seed"] for state in states))  # each drops out what it will
    assert len(list((whole / first).glob("random_states*"))) == 2
    shutil.copytree(whole / first, resumed / first)
    last_line(two(script, *options(data, resumed, 4), "--resume", "latest"))
    assert_equal(weights(resumed / last), weights(whole / last))
    assert {path.name for path in (resumed / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}


def stub(number: int = 0, kind: DistributedType = DistributedType.NO) -> SimpleNamespace:
    """An accelerator that has nothing to load."""
    return SimpleNamespace(
        register_save_state_pre_hook=lambda hook: None, register_load_state_pre_hook=lambda hook: None,
        load_state=lambda folder: None, process_index=number, distributed_type=kind,
    )


def test_processes_that_a_resumed_run_did_not_have_draw_numbers_of_their_own(trained):
    folder, drawn = trained / "checkpoints/step-00000004", []
    model = ImageTransformer.from_pretrained(folder / "raw")
    for number in (1, 2, 1):
        Checkpoints(folder.parent, stub(number), model, model, 2).load(folder)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[2] != drawn[1]


# ---- FSDP --------------------------------------------------------------------------------------------------


def test_fsdp_on_two_processes_does_what_one_does_and_resumes_bit_for_bit(data, two, tmp_path):
    # accelerate shards on GPUs alone, and is made to do so here: all that follows is what a GPU would see.
    script = altered(tmp_path / "sharded.py", f"""
os.environ.update({FSDP}, ACCELERATE_USE_FSDP="true")
from accelerate import state
init = state.AcceleratorState.__init__
def on_cpus_too(self, *arguments, fsdp_plugin=None, **options):
    init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
state.AcceleratorState.__init__ = on_cpus_too
""")
    one, whole, resumed = (tmp_path / name for name in ("one", "whole", "resumed"))
    train(data, one, "--max-steps", 8, "--optimizer", "adamw")
    assert last_line(two(script, *options(data, whole), "--optimizer", "adamw"))["num_processes"] == 2
    first, last = "checkpoints/step-00000004", "checkpoints/step-00000008"
    assert (whole / last / "pytorch_model_fsdp.bin").exists()  # accelerate's, if the model is really cut up
    assert figures(whole) == pytest.approx(figures(one), abs=1e-4)
    found, expected = weights(whole / last), weights(one / last)
    assert max((found[name] - weight).abs().max() for name, weight in expected.items()) < 1e-3  # eight steps of 4e-3

    shutil.copytree(whole / first, resumed / first)
    last_line(two(script, *options(data, resumed), "--optimizer", "adamw", "--resume", "latest"))
    assert_equal(weights(resumed / last), found)


@pytest.mark.parametrize("file, kind", [("pytorch_model_fsdp.bin", DistributedType.NO), ("other", DistributedType.FSDP)])
def test_a_run_goes_on_with_fsdp_if_it_began_so(file, kind, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(SystemExit, match="with FSDP|without FSDP"):
        Checkpoints(tmp_path.parent, stub(kind=kind), None, None, 2).load(tmp_path)


@pytest.mark.parametrize(
    "kind, version, wrap, optimizer, sentence",
    [
        (DistributedType.MULTI_CPU, 2, None, "adamw", "accelerate shards on GPUs alone"),
        (DistributedType.FSDP, 1, None, "adamw", "only version 2 with NO_WRAP"),
        (DistributedType.FSDP, 2, len, "adamw", "only version 2 with NO_WRAP"),
        (DistributedType.FSDP, 2, None, "muon", "--optimizer adamw or paper"),
        (DistributedType.FSDP, 2, None, "adamw", None),
    ],
)
def test_fsdp_that_would_be_another_thing_is_refused(kind, version, wrap, optimizer, sentence, monkeypatch):
    plugin = SimpleNamespace(fsdp_version=version, auto_wrap_policy=wrap, mixed_precision_policy="bf16")
    accelerator = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin))
    check_sharding(accelerator, "muon")  # not asked for
    assert plugin.mixed_precision_policy == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if sentence is None:
        check_sharding(accelerator, optimizer)
        assert plugin.mixed_precision_policy is None  # weights stay in float32, autocast does the rest
    else:
        with pytest.raises(SystemExit, match=sentence):
            check_sharding(accelerator, optimizer)


# ---- evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, choice",
    [
        ("class", ("--limit", 10, "--batch-size", 3)),  # batches of 3, 3, 3 and 1; validation above is one batch for two
        ("sr", ("--batch-size", 4, "--samples", 5)),  # 4, 4 and 3; samples: 4 and 1
    ],
)
def test_two_processes_count_every_image_once_and_find_what_one_does(task, choice, two, tmp_path, capsys, monkeypatch):
    small("dmol", task).save_pretrained(tmp_path / "model")
    write(tmp_path / "test.parquet", pictures(11).numpy(), labels=[1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1])
    command = ["--checkpoint", tmp_path / "model", "--data", tmp_path / "test.parquet", *choice, "--breakdown"]
    done = two("evaluate.py", *command, tmp_path / "two.json")
    found = last_line(done)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    evaluate.main([str(word) for word in (*command, tmp_path / "one.json")])
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found.pop("num_processes"), expected.pop("num_processes")) == (2, 1)
    assert found.pop("images_per_second") > 0 and expected.pop("images_per_second") > 0
    assert found == expected and ("consistency_rmse" in found) == (task == "sr")  # to the last bit: of the same batches
    assert done.stdout.count("images_per_second") == 2  # in the table and in the object: one process prints
    parts, whole = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    places, all_places = (torch.tensor(figures.pop("per_position"), dtype=torch.float64) for figures in (parts, whole))
    assert parts == whole and (places - all_places).abs().max() < 1e-12


# ---- launches ----------------------------------------------------------------------------------------------


def test_processes_that_were_asked_for_and_not_started_are_refused(data, tmp_path):
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")  # starts one
    done = run("train.py", *options(data, tmp_path / "run"), interpreter=launch)
    assert done.returncode != 0 and "Several processes were asked for" in done.stderr and not (tmp_path / "run").exists()


def test_torchruns_own_report_of_a_refusal_ends_with_its_sentence(tmp_path, monkeypatch):
    @told_by_the_launcher
    def main():
        raise SystemExit("No data.")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="No data."):
        main()
    assert ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json")).message == "No data."


def test_an_evaluation_in_processes_that_do_not_know_of_each_other_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="ACCELERATE_USE_CPU=true torchrun"):
        evaluate.main(["--checkpoint", "none", "--data", "none"])


def test_the_configs_are_what_accelerate_reads():
    kinds = {name: (config.distributed_type, config.num_machines) for name, config in CONFIGS.items()}
    assert kinds == {
        "one-gpu": (DistributedType.NO, 1), "many-gpus": (DistributedType.MULTI_GPU, 1),
        "many-nodes": (DistributedType.MULTI_GPU, 2), "fsdp": (DistributedType.FSDP, 1),
    }
    assert FSDP["FSDP_VERSION"] == "2" and FSDP["FSDP_AUTO_WRAP_POLICY"] == "NO_WRAP"


def test_the_launches_that_readme_names_are_well_formed():
    named = set()
    for words in map(shlex.split, re.findall(r"`(accelerate launch --config_file .*?)`", (ROOT / "README.md").read_text())):
        args = launch_command_parser().parse_args(words[2:])
        source = (ROOT / args.training_script).read_text()
        assert all(f'"{word}"' in source for word in args.training_script_args if word.startswith("--")), words
        named.add(Path(args.config_file).stem)
        assert (ROOT / args.config_file).exists(), words
    assert named == CONFIGS.keys()


# ---- files that cannot be written --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "writer, trouble, sentence",
    [
        ("imtx.ImageTransformer.save_pretrained", "resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))", "File too large"),
        ("torch.save", "resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))", "the disk may be full."),
        (
            "imtx.ImageTransformer.save_pretrained",
            "os.chmod(os.path.dirname(arguments[1]), 0o500); os.geteuid() or os.seteuid(65534)",  # root may write anywhere
            "cannot be written to: Permission denied",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_written_costs_none_before_it(writer, trouble, sentence, data, trained, tmp_path):
    script, output = tmp_path / "troubled.py", tmp_path / "run"
    altered(script, f"""
import resource, torch
def troubled(function):
    def write(*arguments, **options):
        if "step-00000008" in str(arguments[1]):
            {trouble}
        return function(*arguments, **options)
    return write
{writer} = troubled({writer})
""")
    done = run(script, *options(data, output))
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
    assert "--resume latest goes on from the last one" in done.stderr
    assert_equal(weights(output / "checkpoints/step-00000004"), weights(trained / "checkpoints/step-00000004"))
    if writer == "torch.save":  # weights were there, the optimizer was not
        assert (output / "checkpoints/.step-00000008.part/ema/model.safetensors").exists()
        assert train(data, output, "--max-steps", 8, "--resume", "latest")["steps"] == 8
        last = "checkpoints/step-00000008"
        assert_equal(weights(output / last), weights(trained / last))
        assert {path.name for path in output.glob("checkpoints/*")} == {"step-00000004", "step-00000008", "before-decay"}


def test_only_what_is_a_matter_of_files_is_told_as_one(tmp_path):
    def method(error: Exception):
        def fail(run):
            raise error
        return in_a_sentence(fail)

    run = SimpleNamespace(args=SimpleNamespace(output=tmp_path), checkpoints=SimpleNamespace(last=None))
    full = f"^{tmp_path} cannot be written to: No space left on device. "
    with pytest.raises(SystemExit, match=f"{full}There is no checkpoint in it yet: leave --resume out"):
        method(OSError(28, "No space left on device"))(run)
    run.checkpoints.last = "step-00000004"
    with pytest.raises(SystemExit, match=f"{full}Checkpoints in it are whole: --resume latest"):
        method(OSError(28, "No space left on device"))(run)
    with pytest.raises(RuntimeError, match="shapes"):
        method(RuntimeError("shapes do not fit"))(run)
    assert in_a_sentence(lambda run: run.args.output)(run) == tmp_path


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    folder, synced = tmp_path / "x", []
    (folder / "raw").mkdir(parents=True)
    (folder / "raw/a").write_text("a")
    (folder / "b").write_text("b")
    monkeypatch.setattr(checkpoints.os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    checkpoints.seal(folder)
    assert set(synced) == {str(path) for path in folder.rglob("*") if path.is_file()}
