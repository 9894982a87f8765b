"""Pack every bundle together with the code it runs on, in the forms that people download.

``python bundles/pack.py --out dist`` writes, for each bundle,

- ``<name>_v<version>.zip``: the bundle and the whole of ``common/``, runs from an empty folder. All of
  ``common``, because bundles load one another and one Python process has room for one ``common``;
- ``huggingface/<name>/``: the same as a folder, its card as the front page: one repository of the hub each;

and ``SHA256SUMS`` and ``model_info.json`` over all of them. The latter is what ``python -m monai.bundle
download --source github`` looks for as ``models/model_info.json`` in the tree of the release's tag; a bundle
with ``_v`` in its name is not in it and downloads with ``--version``. The same files give the same bytes:
entries are sorted and have no time.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

BUNDLES = Path(__file__).resolve().parent
REPOSITORY = BUNDLES.parent
PARTS = ("LICENSE", "golden.json", "large_files.yml", "configs/*", "docs/*", "models/*")
CODE = tuple(f"common/**/*.{suffix}" for suffix in ("py", "csv", "html", "json"))
HERE = """\
`common/` in this folder is the code that it runs on. `dale-ct`, `data_prep`, `make` and `bundles/_overlays`
are in the repository; its `pip install .` brings the first two.

"""
IN_PYTHON = """In Python, from any folder:

```python
from monai.bundle import create_workflow

root = "{name}"  # where this folder lies
workflow = create_workflow(
    config_file=f"{{root}}/configs/inference.json",
    workflow_type="inference",
    bundle_root=root,
    dataset_dir="ct.nii.gz",
    output_dir="embeddings",
)
workflow.run()
```

`monai.bundle.load("{name}", bundle_dir=".", workflow_type="inference", args_file={{"bundle_root": root}})`
gives the network, from the folder above this one, if `models/model.pt` is here: weights trained with the
bundle travel with it. Released ones are found when the workflow runs.

"""
NO_TIME = (1980, 1, 1, 0, 0, 0)
HUB_HEADER = "---\nlibrary_name: monai\nlicense: {}\ntags: [monai, medical, ct, chest]\n---\n\n"


def contents(bundle: Path) -> dict[str, bytes]:
    """Return the files that travel with a bundle, by their path inside it, sorted.

    Links of its documents that lead out of the bundle become plain text, and paths those from its own folder,
    with other bundles beside it. Weights are there twice, as MONAI's ``load`` reads ``models/model.pt``.
    """
    files: dict[str, bytes] = {}
    for root, patterns in ((bundle, PARTS), (REPOSITORY, CODE)):
        for path in sorted(match for pattern in patterns for match in root.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    is_encoder = b'"weights_name"' in files.get("configs/inference.json", b"")
    for name in [name for name in files if name.endswith(".md")]:
        text = re.sub(r"\[([^\]]+)\]\((?:\.\./){2}[^)]*\)", r"\1", files[name].decode())
        text = text.replace("From the root of the repository", "From the folder of this bundle")
        text = text.replace(f"bundles/{bundle.name}/", "").replace(f"bundles/{bundle.name}", ".")
        text = re.sub(r"\bbundles/(?=[a-z])", "../", text)  # not _overlays, which stay in the repository
        here = HERE + (IN_PYTHON.format(name=bundle.name) if is_encoder else "")
        files[name] = text.replace("## Inputs and outputs", f"{here}## Inputs and outputs", 1).encode()
    if weights := files.get("models/model.safetensors"):
        import torch
        from safetensors.torch import load

        torch.save(load(weights), file := io.BytesIO())
        files["models/model.pt"] = file.getvalue()
    return dict(sorted(files.items()))


def write_zip(path: Path, top: str, files: dict[str, bytes]) -> str:
    """Write an archive with one folder and return its SHA-256."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(f"{top}/{name}", NO_TIME)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_hub_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a bundle as a folder for the Hugging Face hub, with its card as README.md.

    The code is under Apache-2.0; weights are under what the released ones and CT-RATE, their data, ask for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    licence = "cc-by-nc-sa-4.0" if "models/model.safetensors" in files else "apache-2.0"
    card = HUB_HEADER.format(licence).encode() + files["docs/README.md"].replace(
        b"(data_license.txt)", b"(docs/data_license.txt)"
    )
    for name, data in (files | {"README.md": card}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def pack(bundles: list[Path], out: Path, url: str) -> Iterator[Path]:
    """Pack bundles into ``out``; yields each archive.

    Args:
        bundles: their folders.
        out: folder to write to.
        url: where the archives will lie, for ``model_info.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    for bundle in bundles:
        version = json.loads((bundle / "configs" / "metadata.json").read_text())["version"]
        name, files = f"{bundle.name}_v{version}", contents(bundle)
        digests[name] = write_zip(out / f"{name}.zip", bundle.name, files)
        write_hub_folder(out / "huggingface" / bundle.name, files)
        yield out / f"{name}.zip"
    base = url.rstrip("/") + "/" if url else ""
    info = {
        name: {"checksum": digest, "source": f"{base}{name}.zip"}
        for name, digest in digests.items()
        if name.count("_v") == 1  # MONAI would offer dale_ct_1s_v2 as a version of dale_ct_1s
    }
    (out / "model_info.json").write_text(json.dumps(info, indent=4) + "\n")
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {name}.zip\n" for name, digest in digests.items()))


def main() -> int:
    """Pack the bundles that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="bundles to pack; all by default")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist", help="folder to write to")
    parser.add_argument(
        "--url", default="", help="where the archives will be, such as https://.../download/v0.1.0"
    )
    arguments = parser.parse_args()
    known = {
        path.parents[1].name: path.parents[1] for path in sorted(BUNDLES.glob("*/configs/metadata.json"))
    }
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        sys.stderr.write(f"names must be bundles, got '{unknown[0]}'. Known: {', '.join(known)}.\n")
        return 1
    for path in pack([known[name] for name in arguments.names or known], arguments.out, arguments.url):
        sys.stdout.write(f"{path} {path.stat().st_size / 2**10:.0f} KiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
