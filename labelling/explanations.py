"""Explanations of features from files, the web, a bucket or the Hub, and of which SAE they are."""

import http.client
import io
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import numpy as np

import labels
from labels import sae_name
from runtime import rows
from runtime.messages import brief
from runtime.sources import TINY, UserError, fetch
from sae import JumpReLUSAE


class Explanations(NamedTuple):
    """N features of one SAE."""

    features: np.ndarray  # int64 [N], ascending
    texts: list[str]  # [N]; several explanations of a feature are joined by " | "
    kind: str  # "fires" or "promotes", as labels.Labels
    sae: dict[str, str | None]  # sae, sae_id, sae_sha256
    name: str  # where they come from
    counts: dict[str, int]  # rows read; empty, padded, repeated ones; features with several


def read_explanations(
    name: str, source: str | None = None, sae: str | None = None, sae_id: str | None = None
) -> Explanations:
    """Read the explanations called `name`: tiny, a file, a folder, a web address, s3://, a Hub id.

    source: MODEL/LAYER of Neuronpedia, where a file holds several. sae, sae_id: complete what the
    files say about their SAE. Raises UserError for a file that cannot be read, and for explanations
    of several SAEs, of an unknown one, or of another than sae and sae_id.
    """
    texts: dict[int, list[str]] = {}
    counts = dict.fromkeys(("rows", "empty", "padded", "repeated", "several"), 0)
    stated, first, kind = None, None, "fires"
    for path, file in _files(name):
        header, found = labels.read_header_and_rows(path, file)
        if source is not None:
            found = [r for r in found if f"{r.get('modelId')}/{r.get('layer')}" == source]
        if header or found:
            of = labels.stated_sae(path, header, found)
            if stated is not None and of != stated:
                one, other = brief(sae_name(of)), brief(sae_name(stated))
                raise UserError(f"{path}: is of the SAE {one}, {first} is of {other}.")
            stated, first, kind = of, first or path, header.get("kind") or kind

        for number, row in enumerate(found, start=1):
            k = labels.feature_index(path, number, row)
            text = row.get("description") or row.get("explanation") or ""
            if not isinstance(text, str):
                raise UserError(f"{path}: row {number}: the description must be text.")
            # A lone surrogate, which json allows, could not be written as UTF-8.
            bare = " ".join(text.split()).encode(errors="replace").decode()
            counts["rows"] += 1
            counts["empty"] += not bare
            counts["padded"] += text != text.strip()
            if bare:
                known = texts.setdefault(k, [])
                counts["repeated"] += bare in known
                if bare not in known:
                    known.append(bare)

    if not texts:
        raise UserError(f"--explanations {name}: no explanation in it.")
    counts["several"] = sum(len(of) > 1 for of in texts.values())
    features = np.array(sorted(texts), dtype=np.int64)
    identity = _identity(name, stated or {}, sae, sae_id, int(features[-1]))
    joined = [" | ".join(texts[k]) for k in features.tolist()]
    return Explanations(features, joined, kind, identity, name, counts)


def _files(name: str) -> Iterator[tuple[str | Path, BinaryIO | None]]:
    """(path, open stream or None) of each file of explanations, in natural order."""
    if name == "tiny":
        yield TINY / "labels" / "fires.jsonl", None
    elif re.match(r"\w+://[^/]*@|\w+://.*\?", name):
        raise UserError(
            "--explanations: an address with a password or query in it is not read, because "
            "addresses are shown and recorded."
        )
    elif name.startswith("s3://"):
        yield from _bucket(name)
    elif name.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(name, timeout=60) as response:
                data = response.read(rows.LARGEST + 1)
                if response.length and len(data) <= rows.LARGEST:
                    raise OSError("the connection was lost")
        except (OSError, ValueError, http.client.HTTPException) as e:
            why = getattr(e, "reason", None) or e
            raise UserError(f"--explanations {name}: cannot be fetched ({brief(why)}).") from e
        yield urlsplit(name).path, io.BytesIO(data)
    else:
        for path in _folder(name):
            yield path, None


def _folder(name: str) -> list[Path]:
    """The files of a local path, or of a Hub data set."""
    path = Path(name).expanduser()
    try:
        here, parent = path.exists(), path.parent.is_dir()
    except OSError as e:
        raise UserError(f"--explanations {brief(name)}: cannot be read ({e.strerror}).") from e
    # A name whose folder exists is a path: do not ask the Hub for a misspelt one.
    if not here and parent:
        raise UserError(
            f"--explanations {name}: no such file or folder in {path.parent.resolve()}."
        )
    root = fetch(name, "explanations", [f"*.{kind}" for kind in rows.KINDS]).path
    if not root.is_dir():
        return [root]
    found = [p for p in root.rglob("*") if p.name.endswith(rows.KINDS) and p.is_file()]
    if not found:
        raise UserError(f"--explanations {name}: holds no {', '.join(rows.KINDS)} file.")
    return sorted(found, key=_natural)


def _bucket(url: str) -> Iterator[tuple[str, BinaryIO]]:
    """The files under an address in S3, read without credentials."""
    from pyarrow import fs

    try:
        bucket, start = fs.FileSystem.from_uri(url.replace("s3://", "s3://anonymous@", 1))
        found = [bucket.get_file_info(start)]
        if not found[0].is_file:
            found = bucket.get_file_info(fs.FileSelector(start, recursive=True))
        paths = sorted((f.path for f in found if f.path.endswith(rows.KINDS)), key=_natural)
        if not paths:
            raise UserError(f"--explanations {url}: holds no {', '.join(rows.KINDS)} file.")
        for path in paths:
            yield f"s3://{path}", bucket.open_input_stream(path, compression=None)
    except (OSError, ValueError) as e:
        raise UserError(f"--explanations {url}: cannot be fetched ({brief(e)}).") from e


def _natural(path: str | Path) -> list[str | int]:
    """Sort batch-10 after batch-9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _identity(
    name: str, stated: dict, sae: str | None, sae_id: str | None, largest: int
) -> dict[str, str | None]:
    """Of which SAE the features are: sae and sae_id may complete what is stated."""
    given = dict(sae=sae, sae_id=sae_id, sae_sha256=None)
    if sae is not None and (sae == "tiny" or Path(sae).expanduser().exists()):
        loaded = JumpReLUSAE.from_pretrained(sae, sae_id)  # a file at hand is known by its hash
        given |= dict(sae_id=loaded.sae_id, sae_sha256=loaded.sha256)
        if largest >= loaded.d_sae:
            raise UserError(
                f"--explanations {name}: feature {largest}; --sae {sae} has {loaded.d_sae}."
            )
    if sae and str(stated.get("sae")).startswith(labels.UNKNOWN_SOURCE):
        stated = {}  # a source id that we cannot translate: --sae is all that we know

    def same(key: str) -> bool:
        ours, theirs = given[key], stated.get(key)
        if not ours or not theirs or ours == theirs:
            return True
        # A local copy of a repository goes by the repository's name.
        return key == "sae" and Path(ours).name == Path(theirs).name

    hashed = given["sae_sha256"] and stated.get("sae_sha256")
    if not all(same(key) for key in (["sae_sha256"] if hashed else given)):
        theirs, ours = brief(sae_name(stated)), sae_name(given)
        raise UserError(
            f"--explanations {name}: are of the SAE {theirs}, --sae and --sae-id say {ours}."
        )
    identity = {key: given[key] or stated.get(key) for key in given}
    if identity["sae"] is None:
        raise UserError(
            f"--explanations {name}: do not say of which SAE they are; give --sae and --sae-id."
        )
    return identity
