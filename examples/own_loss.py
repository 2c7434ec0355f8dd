"""Compare a loss of one's own with Hinton's, on the digits that ship with kdlab.

python examples/own_loss.py
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import kdlab
from kdlab.data import digits
from kdlab.functional import Batch, Outputs
from kdlab.losses import KL, Term
from kdlab.models import MLP


class Cosine(Term):
    """The angle between the logits of student and teacher; a term returns one value per row, and never averages."""

    role = "soft"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return one minus the cosine of each row."""
        return 1 - F.cosine_similarity(student.logits, teacher.logits, dim=-1)


def main(epochs: int = 5) -> dict[str, float]:
    """Train a teacher, distil it by each loss, and return the students' accuracies."""
    data = digits(seed=0)
    network = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    torch.manual_seed(0)
    teacher = MLP(hidden=[128], **network)
    kdlab.distill(teacher, None, data.train_dataloader(), data.val_dataloader(), loss={}, epochs=epochs)
    accuracies = {}
    for name, term in {"hinton": KL(), "cosine": Cosine()}.items():
        torch.manual_seed(1)
        student = MLP(hidden=[8], **network)
        loaders = data.train_dataloader(), data.val_dataloader()
        done = kdlab.distill(student, teacher, *loaders, loss={name: term}, alpha=0.5, epochs=epochs)
        accuracies[name] = done.val["acc"]
        print(f"{name}: {done.val['acc']:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
