"""Two moons from 40 noisy points: a small network without and with SMART. With matplotlib it draws `two_moons.png`."""

import math
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from smartreg import SmartLoss


def two_moons(count, noise=0.2):
    angle, labels = math.pi * torch.rand(count, 1), torch.arange(count) % 2
    moon = torch.cat([angle.cos(), angle.sin()], dim=1)
    points = torch.where(labels[:, None] == 0, moon, torch.tensor([1, 0.5]) - moon)
    return points + noise * torch.randn(count, 2), labels


def train(points, labels, lambda_s):
    # SMART perturbs the output of the embedding: word vectors in a language model, here the points themselves.
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    smart = SmartLoss(model, embedding="0", epsilon=0.2, epsilon_scale="absolute")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(400):
        logits, penalty = smart(lambda m: m(points)) if lambda_s else (model(points), 0.0)
        loss = cross_entropy(logits, labels) + lambda_s * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def draw(models, points, labels):
    from matplotlib import pyplot

    across, up = torch.meshgrid(torch.linspace(-1.8, 2.8, 200), torch.linspace(-1.2, 1.7, 200), indexing="xy")
    figure, panels = pyplot.subplots(1, len(models), figsize=(5.6, 2.8), sharey=True)
    for panel, (name, model) in zip(panels, models.items(), strict=True):
        probability = model(torch.stack([across, up], dim=-1)).softmax(-1)[..., 1].detach()
        panel.contourf(across, up, probability, levels=10, cmap="gray", alpha=0.6)
        panel.contour(across, up, probability, levels=[0.5], colors="black")
        for label, marker, colour in ((0, "o", "black"), (1, "^", "white")):
            panel.scatter(*points[labels == label].T, marker=marker, c=colour, edgecolors="gray")
        panel.set_title(name)
    figure.savefig("two_moons.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    torch.manual_seed(0)
    (points, labels), (held_out, truth), models = two_moons(40), two_moons(2000), {}
    for name, lambda_s in (("without SMART", 0.0), ("with SMART", 0.3)):
        torch.manual_seed(1)  # both start from the same weights
        models[name] = train(points, labels, lambda_s)
        logits = models[name](held_out).detach()
        accuracy, loss = (logits.argmax(-1) == truth).float().mean(), cross_entropy(logits, truth)
        print(f"{name}: accuracy {accuracy:.3f}, negative log-likelihood {loss:.3f}")
    draw(models, points, labels) if find_spec("matplotlib") else print("no picture: matplotlib is not installed")
