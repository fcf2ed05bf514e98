"""Make src/vitarium/data/assets/fashion.npz from the published files of Fashion-MNIST.

apt install dataset-fashion-mnist && python tools/pack_fashion.py
VITARIUM_DATA=DIR python tools/pack_fashion.py            # with torchvision's files in DIR/FashionMNIST/raw
"""

from pathlib import Path
from typing import Any

import numpy as np

from vitarium.data.fashion import SIZES, find_published, first_of_each, read_published

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "vitarium" / "data" / "assets" / "fashion.npz"
LICENSE = """The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the
"Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY
CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main() -> None:
    """Write the first images of each class of both parts, in their original order, with their numbers there."""
    folder = find_published()
    arrays: dict[str, Any] = {"license": np.array(LICENSE)}
    for part, count in SIZES.items():
        images, labels = read_published(folder, part)
        kept = first_of_each(labels, count)
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images[kept], labels[kept].astype(np.uint8)
        arrays[f"{part}_numbers"] = kept.astype(np.uint16)
    np.savez_compressed(OUTPUT, **arrays)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1e6:.1f} MB from {folder}")


if __name__ == "__main__":
    main()
