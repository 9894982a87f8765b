"""Chest CT to embeddings: ``dale_ct.embed("ct.nii.gz")``.

The names below are what a user may rely on; each is imported when it is first used.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

_spec = importlib.util.find_spec("common")
_place = _spec and (_spec.origin or next(iter(_spec.submodule_search_locations or ()), None))
if Path(_place or "").resolve().parent != Path(__file__).resolve().parents[1] / "common":
    raise ImportError(
        f"'{_place}' hides the package 'common' of dale-ct. Rename it, or start Python in another folder."
    )

from common import __version__  # noqa: E402 (see above)

if TYPE_CHECKING:
    from common.embeddings.store import EmbeddingStore
    from dale_ct.embedding import embed, embed_to_store
    from dale_ct.encoder import encoders, load_encoder
    from dale_ct.prediction import predict

__all__ = ["EmbeddingStore", "__version__", "embed", "embed_to_store", "encoders", "load_encoder", "predict"]

_HOMES = {
    "EmbeddingStore": "common.embeddings.store",
    "embed": "dale_ct.embedding",
    "embed_to_store": "dale_ct.embedding",
    "encoders": "dale_ct.encoder",
    "load_encoder": "dale_ct.encoder",
    "predict": "dale_ct.prediction",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (a module's attributes)
    if name not in _HOMES:
        raise AttributeError(f"module 'dale_ct' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
