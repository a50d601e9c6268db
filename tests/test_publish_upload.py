"""What train/publish.py sends to the Hub: a fake one, which notes what it is asked for."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from publish_fixtures import OWN, contents, dry, fake, files, refusal  # noqa: F401, some are fixtures

from imtx import ImageTransformer

import publish

# ---- the upload --------------------------------------------------------------------------------------------


def test_what_is_uploaded_is_the_folder_of_the_dry_run_byte_for_byte(dry, here, fake):
    options = [*OWN, "--data", "images.parquet"]
    folder = dry("upscaler", *options)
    assert fake.calls == []
    publish.main(["upscaler", "me/mine", *options])
    assert fake.uploaded == contents(folder) and "training.json" in fake.uploaded
    assert [name for name, *_ in fake.calls] == ["whoami", "create_repo", "upload_folder"]
    _, (repo,), named = fake.calls[1]
    assert repo == "me/mine" and named == {"repo_type": "model", "private": None, "exist_ok": True}
    named = fake.calls[2][2]
    assert (named["repo_id"], named["revision"], named["repo_type"]) == ("me/mine", None, "model")
    assert {"*.safetensors", "*.safetensors.index.json", "training.json"} <= set(named["delete_patterns"])  # of before


def test_a_branch_and_a_private_repo_are_made(here, fake):
    publish.main(["generator", "me/mine", *OWN, "--private", "--revision", "v1"])
    assert [name for name, *_ in fake.calls] == ["whoami", "create_repo", "model_info", "create_branch", "upload_folder"]
    assert fake.calls[1][2]["private"] is True
    assert fake.calls[3][2] == {"branch": "v1", "exist_ok": True} and fake.calls[4][2]["revision"] == "v1"


def test_nothing_goes_to_a_public_repo_that_should_be_private(here, fake, refusal):
    fake.private = False
    assert "me/mine exists and is public" in refusal("generator", "me/mine", *OWN, "--private")
    assert fake.uploaded == {}


def test_from_pretrained_reads_back_what_was_uploaded_at_its_revision(here, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for digit, checkpoint, branch in (("a", "generator", "main"), ("b", "upscaler", "v1")):
        publish.main([checkpoint, "me/mine", *OWN, "--data", "images.parquet", "--revision", branch])
        cache = tmp_path / "models--me--mine"
        for path, content in {f"refs/{branch}": (digit * 40).encode()}.items() | {
            (f"snapshots/{digit * 40}/{name}", content) for name, content in fake.uploaded.items()
        }:
            (cache / path).parent.mkdir(parents=True, exist_ok=True)
            (cache / path).write_bytes(content)
    for revision, checkpoint in (("v1", "upscaler"), ("main", "generator"), (None, "generator"), ("b" * 40, "upscaler")):
        found = ImageTransformer.from_pretrained("me/mine", revision=revision)
        expected = ImageTransformer.from_pretrained(checkpoint)
        assert found.config == expected.config
        assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in found.state_dict().items())


def answer(status: int) -> errors.HfHubHTTPError:
    request = SimpleNamespace(method="POST", url="https://hub/api")
    return errors.HfHubHTTPError(
        "Server says no\nand more", response=SimpleNamespace(status_code=status, headers={}, request=request)
    )


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        ("whoami", errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        ("whoami", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        ("whoami", errors.HTTPError("Name or service not known"), "cannot be reached: Name or service not known"),
        ("whoami", answer(401), "the token is not valid"),
        ("create_repo", answer(403), "the token may not write there"),
        ("create_repo", answer(500), "refuses me/mine: Server says no. (HTTP 500)"),
        ("upload_folder", answer(404), "it does not exist, or the token may not see it"),
        ("upload_folder", ConnectionError("reset by peer"), "the upload broke off: reset by peer"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_sentence(call, error, sentence, here, fake, refusal):
    fake.fails[call] = error
    assert sentence in refusal("generator", "me/mine", *OWN)
    assert fake.calls[-1][0] == call and fake.uploaded == {}


# ---- as it is ----------------------------------------------------------------------------------------------


def test_a_card_that_was_changed_by_hand_is_uploaded_unchanged(dry, fake):
    folder = dry("generator", *OWN)
    with open(folder / "README.md", "a") as card:
        card.write("\nMy own last word.\n")
    publish.main([str(folder), "me/mine", "--as-is"])
    assert fake.uploaded == contents(folder) and fake.uploaded["README.md"].endswith(b"My own last word.\n")


def test_a_folder_is_looked_at_before_the_hub_is_asked(here, fake, refusal, tmp_path):
    fake.fails["whoami"] = errors.LocalTokenNotFoundError("no token")
    assert "README.md cannot be read: No such file" in refusal("generator", "me/mine", "--as-is")
    assert f"There is no folder {tmp_path / 'none'}" in refusal(tmp_path / "none", "me/mine", "--as-is")
    assert fake.calls == []


def test_a_card_that_was_changed_to_a_licence_that_the_weights_cannot_have_is_not_uploaded(dry, fake, refusal):
    folder = dry("upscaler", "--data-name", "celeba", "--data", "images.parquet")
    card = (folder / "README.md").read_text()
    publish.main([str(folder), "me/mine", "--as-is"])
    (folder / "README.md").write_text(card.replace("license: other", "license: mit").replace("license_name", "was"))
    fake.uploaded = {}
    refused = refusal(folder, "me/mine", "--as-is")
    assert "README.md says mit, but these weights are for non-commercial research only" in refused and fake.uploaded == {}


def test_a_folder_that_is_not_all_there_is_not_uploaded(dry, here, fake, refusal):
    folder = dry("generator", *OWN)
    assert "is the card of me/mine, not of me/other" in refusal(folder, "me/other", "--as-is")
    assert "README.md cannot be read: No such file" in refusal("generator", "me/mine", "--as-is")
    assert "leave --licence out" in refusal(folder, "me/mine", "--as-is", "--licence", "mit")
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(folder, "me/mine", "--as-is")
    (folder / "notes.txt").unlink()
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("parameters: 20420", "parameters: 20421"))
    assert "says 20421 parameters, the model has 20420" in refusal(folder, "me/mine", "--as-is")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# hello\n")
    assert "no card of train/publish.py" in refusal(folder, "me/mine", "--as-is")
    (folder / "README.md").write_text("---\nlicense: [\n---\n# hello\n")
    assert "front matter cannot be read" in refusal(folder, "me/mine", "--as-is")
    assert fake.uploaded == {}


def test_who_may_not_upload_hears_so_before_anything_is_measured(here, fake, refusal, monkeypatch):
    fake.fails["whoami"] = errors.LocalTokenNotFoundError("no token")
    monkeypatch.setattr(publish, "build", lambda *_: pytest.fail("built"))
    assert "hf auth login" in refusal("generator", "me/mine", *OWN)
