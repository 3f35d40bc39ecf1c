"""Takes llama.cpp's vocabulary files and their test vectors out of llama-cpp-python's source archive."""

import sys
import tarfile
from pathlib import Path


def main(archive: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and "/models/ggml-vocab-" in member.name and (content := tar.extractfile(member)):
                (folder / Path(member.name).name).write_bytes(content.read())


if __name__ == "__main__":
    main(*sys.argv[1:])
