"""Which model a name means, and where it is looked for: a folder, the bundled ones, what was downloaded, the Hub."""

import http.server
import shutil
import threading
from pathlib import Path

import pytest
from conftest import small, small_config

from imtx import ImageTransformer, checkpoint


@pytest.fixture
def saved(tmp_path):
    small("dmol", "class").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_comes_before_a_bundled_model_of_its_name(saved, tmp_path, monkeypatch):
    small("dmol", "sr").save_pretrained(tmp_path / "bundled/model")
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("model") == Path("model")


def test_what_was_downloaded_once_is_found_without_the_hub(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "_reachable", lambda endpoint: False)
    cache = tmp_path / "hub/models--nobody--thing"
    shutil.copytree(saved, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("a" * 40)
    assert ImageTransformer.from_pretrained("nobody/thing").config == small_config("dmol", "class")


def test_a_hub_that_answers_with_an_error_is_there():
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_): ...

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert checkpoint._reachable(f"http://127.0.0.1:{server.server_port}")


def test_others_may_read_the_weights(saved):
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in saved.glob("*.safetensors"))
