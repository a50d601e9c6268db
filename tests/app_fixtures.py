"""The running demo, one for all tests of it. Test modules load this with `pytest_plugins = "app_fixtures"`."""

import pytest

from server import Listener, Server


@pytest.fixture(scope="session")
def outside():
    """Stands for everything beyond this machine: `app` reaches the Hub and other hosts through it alone."""
    with Listener() as listener:
        yield listener


@pytest.fixture(scope="session")
def app(outside, tmp_path_factory):
    """The demo with its bundled weights."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), outside.url)
    proxies |= {"no_proxy": "127.0.0.1,localhost"}
    proxies |= {name.upper(): value for name, value in proxies.items()}
    with Server(tmp_path_factory.mktemp("app"), HF_ENDPOINT=outside.url, **proxies) as server:
        assert "not loaded" not in server.log, server.log
        yield server
