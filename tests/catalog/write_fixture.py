"""Write tests/fixtures/saved-<version>.safetensors, which every later version must load.

Run at a release: python -m tests.catalog.write_fixture
"""

from pathlib import Path

import torch

import vitarium
from vitarium.files import write_json


def main() -> None:
    torch.manual_seed(0)
    model = vitarium.create_model("convnext_pico", num_classes=3, dims=(12, 24), drop_path_rate=0.1).eval()
    model.labels = ["cat", "dog", "größe"]
    path = Path(__file__).parents[1] / "fixtures" / f"saved-{vitarium.__version__}.safetensors"
    vitarium.save(model, path)
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        logits = model(image)[0].tolist()
    write_json(path.with_suffix(".json"), dict(labels=model.labels, preprocessing=model.preprocessing.to_dict(), logits=logits))


if __name__ == "__main__":
    main()
