"""A plain training loop; the two lines that mention the recorder are all that stagewise adds to it."""

import torch
from shapes import ConvNet, draw, losses

import stagewise as sw

BATCH, STEPS = 40, 300


def main() -> None:
    torch.manual_seed(0)
    images, classes = draw(240, seed=1)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = sw.log_spaced(STEPS, 8, first=10)
    recorder = sw.Recorder("checkpoints", model, optimizer, schedule, batch_size=BATCH)  # <- stagewise
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(images), (BATCH,))
        loss = losses(model, (images[chosen], classes[chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder(step, chosen)  # <- stagewise
    print(f"step {STEPS}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
