"""Checkpoints that are folders, or several files that an index names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdlab.errors import UserError
from kdlab.system.files import Unreadable, read_json

NAMES = (
    *("model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Files of weights by which transformers and diffusers store a network in a folder, the first of which is taken."""

INDEX = ".index.json"
"""Ending of the name of a file that says which tensor is in which file beside it."""


def weights_in(path: Path, key: str) -> Path:
    """Return the file of weights in a folder; ``path`` itself where it is no folder.

    Raises:
        UserError: the folder holds no such file; says what to do about those of DeepSpeed and of torch.distributed.
    """
    if not path.is_dir():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    if (path / "zero_to_fp32.py").is_file() or (path / "latest").is_file() or list(path.glob("*_model_states.pt")):
        raise UserError(
            key,
            f"{path} is a folder of DeepSpeed's, whose weights are split between files",
            f"the file made by python {path / 'zero_to_fp32.py'} {path} FILE",
        )
    if (path / ".metadata").is_file():
        raise UserError(
            key,
            f"{path} is a folder of torch.distributed.checkpoint",
            (f"the file made by python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"),
        )
    held = sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"))
    examples = f" (such as {', '.join(held[:4])} in it)" if held else ""
    raise UserError(key, f"cannot read {path}: is a folder", f"a file{examples}, or the folder of a run")


def shards_of(path: Path, key: str) -> list[Path]:
    """Return the files that an index names, each once and beside it; none where ``path`` is no index.

    Raises:
        UserError: the index is damaged, or names a file that is not there or elsewhere.
    """
    if not path.name.endswith(INDEX):
        return []
    try:
        index = read_json(path)
    except FileNotFoundError:
        return []
    except (OSError, Unreadable) as error:
        raise UserError(key, f"cannot read {path}: {error}") from None
    places = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(key, f"{path} is no index of weights (no weight_map)", "a checkpoint")
    parts = [path.parent / name for name in dict.fromkeys(places.values())]
    for part in parts:
        if part.parent != path.parent or part.name in ("", ".", ".."):
            raise UserError(key, f"{path} names {part}", "files beside it")
        if not part.is_file():
            raise UserError(key, f"{path} names {part.name}, which is not there", "all of its files")
    return parts
