"""Train a grown model in PyTorch, and take it back into ONNX.

    python examples/train_torch.py [MODEL] [--steps 50] [--resume]

Writes into out/: the loss of each step as CSV and PNG, a checkpoint, and the trained model as ONNX.
"""

from __future__ import annotations

import common
import torch

from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.torch import load


def main() -> None:
    options = common.arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(options.model, device=device)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=options.rate, weight_decay=0.0)
    losses: list[float] = []
    checkpoint = options.output / "torch.pt"
    if options.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    steps = options.steps - len(losses)
    for inputs, targets in common.progress(common.batches(options, len(losses)), steps):
        ids, labels = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 25 == 0 or len(losses) == options.steps:
            save()
    common.draw_losses(losses, options.output / "torch_losses.csv")
    result = absorb(options.model, model.state_dict(), options.output / "torch_trained.onnx")
    print(f"{options.output / 'torch_trained.onnx'}: {len(result.replaced)} tensors replaced")


if __name__ == "__main__":
    main()
