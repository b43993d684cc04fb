"""Double descent (arXiv 1812.11118): the test error of ever wider models, beyond those that just fit everything."""

from __future__ import annotations

from pydantic import Field

from retrace.core.config import Experiment, Frozen
from retrace.core.cost import Cost, Memory
from retrace.core.paper import Paper, Program, Stage


class Data(Frozen):
    """Which of scikit-learn's 1797 images of digits (8 x 8 pixels) are drawn, by the seed."""

    num_train: int = Field(ge=10)
    num_test: int = Field(ge=10)


class Features(Frozen):
    """Random Fourier features: cos(v.x + b), v normal with the standard deviation 1 / bandwidth."""

    per_example: float = Field(gt=0)  # number of features over that of training examples
    bandwidth: float = Field(gt=0)  # in units of a pixel's whole range


class DoubleDescentConfig(Experiment):
    """What main.yaml composes to: the shared parts of every paper (scale, seed, hardware, tracking), and these."""

    data: Data
    features: Features
    ridge: float = Field(ge=0)  # weight of the squared norm of the coefficients; 0: the solution of least norm


class FitConfig(Frozen):
    """What one run depends on: this, and nothing else, is hashed into its id."""

    data: Data
    features: Features
    ridge: float
    seed: int

    @property
    def num_features(self) -> int:
        return max(1, round(self.features.per_example * self.data.num_train))


def stages(config: DoubleDescentConfig) -> Stage:
    """The runs that an experiment needs: here one, which builds on no other."""
    c = config
    return Stage("fit", FitConfig(data=c.data, features=c.features, ridge=c.ridge, seed=c.seed), seed=c.seed)


def cost(config: FitConfig) -> Cost:
    """A singular value decomposition of num_train x num_features numbers, for `retrace plan`."""
    rows, columns = config.data.num_train, config.num_features
    numbers = 8.0 * (rows + config.data.num_test) * columns
    memory = Memory(parameters=0, trained=0, precision="fp32", activations=numbers, checkpointed=numbers)
    return Cost(tokens=0, flops=4.0 * rows * columns * min(rows, columns), memory=memory)


PAPER = Paper(
    slug="double_descent",
    title="Reconciling Modern Machine-Learning Practice and the Classical Bias-Variance Trade-Off",
    arxiv="1812.11118",
    recipe=1,
    config=DoubleDescentConfig,
    stages=stages,
    programs={"fit": Program(FitConfig, "double_descent.programs:fit", cost)},
)
