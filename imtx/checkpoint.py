"""Model folders: config.json and safetensors shards. Saving, loading, and finding the folder that a name means."""

import json
import queue
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from httpx import HTTPError
from huggingface_hub import constants, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import Config

SHARD_SIZE = 9_000_000  # bytes; a plain git push to a Space refuses files of 10 MB
BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "weights"


class CheckpointError(Exception):
    """A model folder cannot be found or loaded. The message names the file and the cause."""


@dataclass(frozen=True)
class Origin:
    """What weights were made from. It stays with them, in the metadata of every shard, so that no copy loses the licence.

    Raises ValueError for names that are no words and for a licence without an id.
    """

    init: str | None = None  # the model that was trained on
    average_of: tuple[str, ...] = ()  # the models whose mean they are
    licence: dict[str, str | None] | None = None  # of all these or, if it binds, of their data: "id", "name", "link" (Hub)

    def __post_init__(self):
        object.__setattr__(self, "average_of", tuple(self.average_of))
        named = (self.init, *self.average_of, *(self.licence or {}).values())
        if not all(word is None or isinstance(word, str) for word in named):
            raise ValueError(f"names must be words, got {named}.")
        if self.licence is not None and (self.licence.keys() != {"id", "name", "link"} or not self.licence["id"]):
            raise ValueError(f"licence must have id, name and link, got {self.licence}.")


def save(model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json and weights to `folder`, all or nothing: an old model there is replaced at the end.

    dtype: torch.float32 or torch.bfloat16, of the matrices inside the blocks. All else is stored in float32: it is little,
    and rounded to bfloat16 it cost the bundled models 0.004 bits/dim and more, of which the matrices made less than 0.0001.

    Files of other names in the folder, a README.md say, stay. Raises OSError, and ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}.")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        weights = {
            name: tensor.to(dtype if in_a_block(name) and tensor.ndim == 2 else torch.float32).contiguous()
            for name, tensor in model.state_dict().items()
        }
        _write_shards(weights, new, model.origin)
        model.config.save(new / "config.json")
        if folder.exists():
            for kept in folder.iterdir():
                if not _is_weights(kept) and kept.name != "config.json":
                    copy = shutil.copytree if kept.is_dir() else shutil.copy2
                    copy(kept, new / kept.name)
            old = Path(temporary) / "old"
            folder.rename(old)
            try:
                new.rename(folder)
            finally:
                if not folder.exists():  # Ctrl-C, too, may come in between
                    old.rename(folder)
        else:
            new.rename(folder)


def _write_shards(weights: dict[str, torch.Tensor], folder: Path, origin: Origin | None) -> None:
    """Like huggingface_hub's save_torch_state_dict, which leaves shards without metadata where there are several."""
    metadata = {"format": "pt"} | ({} if origin is None else {"origin": json.dumps(asdict(origin))})
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_SIZE)
    for shard, names in split.filename_to_tensors.items():
        try:
            save_file({name: weights[name] for name in names}, folder / shard, metadata)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(str(error)) from error
        (folder / shard).chmod(0o644)  # safetensors writes files that only their owner can read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def load_origin(folder: Path) -> Origin | None:
    """What the weights in `folder` say that they were made from; None: nothing. Raises CheckpointError."""
    for shard in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                noted = (file.metadata() or {}).get("origin")
            if noted is not None:
                return Origin(**json.loads(noted))
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{shard} does not tell what it was made from ({error}). Download it again.") from error
    return None


def load(model_class, folder: Path):
    """The model in `folder`, in float32 and eval mode. Raises CheckpointError if anything is missing or foreign."""
    try:
        config = Config.load(folder / "config.json")
    except FileNotFoundError as error:
        hint = f" Did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        raise CheckpointError(f"{folder} holds no config.json: it is no model folder.{hint}") from error
    except OSError as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model: {error}") from error
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are random, and the caller's numbers are none of them
            model = model_class(config)
    except (RuntimeError, MemoryError) as error:  # torch's word, and Python's, for too little memory
        raise CheckpointError(f"{folder / 'config.json'} describes a model that cannot be made here: {error}") from error
    weights, home = {}, {}
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} holds no .safetensors file. Weights of other formats are not read.")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}. Download it again.") from error
        for missing in sorted(named - {shard.name for shard in shards}):
            raise CheckpointError(f"{folder / missing} is missing, which {index.name} names.")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():
                    if name in weights:
                        raise CheckpointError(f"{shard} and {home[name].name} both hold {name}: remove the one too many.")
                    weights[name], home[name] = file.get_tensor(name).float(), shard
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is damaged or no safetensors file ({error}). Download it again.") from error
    expected = model.state_dict()
    if missing := sorted(expected.keys() - weights.keys()):
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(expected)} weights, {missing[0]} first.")
    if foreign := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(f"{home[foreign[0]]} holds weights of another model: {foreign[0]}.")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise CheckpointError(
                f"{home[name]}: {name} is of shape {tuple(weight.shape)}, "
                f"config.json asks for {tuple(expected[name].shape)}."
            )
    model.load_state_dict(weights)
    model.origin = load_origin(folder)
    return model.eval()


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a path, else a bundled name, else a Hub id ("owner/name", downloaded once).

    revision: branch, tag or commit of a Hub id. Raises CheckpointError, at once if the Hub cannot be reached.
    """
    path = Path(name)
    if revision is not None and (path.is_dir() or (BUNDLED / str(name)).is_dir()):
        raise CheckpointError(f"{name} is a folder here, which has no revision {revision}: leave it out, or name a Hub id.")
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file. Name the folder that holds config.json and the weights.")
    if (BUNDLED / path.name / "config.json").is_file() and path.name == str(name):
        return BUNDLED / path.name
    if len(path.parts) != 2 or path.is_absolute():
        if bundled := ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))):
            raise CheckpointError(f"There is no folder {name} and no bundled model of that name (bundled: {bundled}).")
        raise CheckpointError(
            f"There is no folder {name}, and no model is bundled here: weights come with the repository and its Space, not with "
            "the package. Name a Hub id, owner/name, or a folder in assets/weights of a checkout."
        )
    return _download(str(name), revision)


def _download(hub_id: str, revision: str | None) -> Path:
    wanted = {"allow_patterns": ["*.json", "*.safetensors"], "revision": revision}
    try:
        return Path(snapshot_download(hub_id, local_files_only=True, **wanted))
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the Hub
    except HFValidationError as error:
        raise CheckpointError(f"{hub_id} is neither a folder here nor a Hub id.") from error
    if not constants.HF_HUB_OFFLINE and not _reachable(constants.ENDPOINT):
        raise CheckpointError(f"{hub_id} is no folder here, and {constants.ENDPOINT} cannot be reached to download it.")
    try:
        return Path(snapshot_download(hub_id, **wanted))
    except (HfHubHTTPError, HTTPError, OSError) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{hub_id} cannot be downloaded: {cause}") from error


def _reachable(endpoint: str, seconds: float = 1.5) -> bool:
    """Whether a server answers in time. huggingface_hub itself would go on trying for 23 seconds.

    In a thread, because looking up a host's name heeds no time limit.
    """
    answers = queue.Queue()

    def ask():
        try:
            urllib.request.urlopen(endpoint, timeout=seconds).close()
            answers.put(True)
        except urllib.error.HTTPError:
            answers.put(True)  # an answer, if not a kind one
        except OSError:  # URLError and time-outs are of this kind
            answers.put(False)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


def in_a_block(name: str) -> bool:
    """Whether a weight of that name belongs to a decoder or encoder block."""
    return name.startswith(("decoder.", "encoder."))


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
