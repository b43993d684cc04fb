"""The runs that an experiment needs, and what must be at hand before any of them starts.

(prepare, real data only) -> pretrain_encoder, pretrain_decoder -> pretrain (-> finetune) -> evaluate (-> choose_rate)

Encoders and decoders are shared by all experiments that make them alike; pretrained ones take their places.
"""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

from retrace.core.config import data_root
from retrace.core.paper import Stage
from retrace.core.tasks import require_hub, task_fingerprint, validate_tasks
from retrace.core.weights import require_weights
from retrace.papers.mm1 import corpora, cost
from retrace.papers.mm1.choices import (
    Corpora,
    ImageTask,
    PretrainedDecoder,
    PretrainedEncoder,
    ScratchDecoder,
    ScratchEncoder,
)
from retrace.papers.mm1.config import TASKS, Decoders, MM1Config, Rates
from retrace.papers.mm1.corpora import HubDataset
from retrace.papers.mm1.lines import EndsEarly
from retrace.papers.mm1.program_configs import (
    ChooseConfig,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    FinetuneConfig,
    LawConfig,
    PretrainConfig,
    TokenizerConfig,
)


def stages(config: MM1Config) -> Stage:
    """The last stage of an experiment, with those that it builds on. Raises ValueError for an unknown task."""
    if config.rates is not None:
        return _law(config, config.rates) if config.rates.law else _choice(config, config.rates)
    c, files = config, _fingerprints(config)
    words = _tokenizer(c, files)
    parents = {**words}
    if isinstance(c.encoder, ScratchEncoder):
        seen = EncoderConfig(
            vision=c.vision, encoder=c.encoder, data=c.data, files=_of(files, c.encoder.captions), seed=c.encoder.seed
        )
        parents["encoder"] = Stage("pretrain_encoder", seen, seed=c.encoder.seed, parents=words)
    if isinstance(c.decoder, ScratchDecoder):
        read = DecoderConfig(decoder=c.decoder, data=c.data, files=_of(files, "text"), seed=c.decoder.seed)
        parents["decoder"] = Stage("pretrain_decoder", read, seed=c.decoder.seed, parents=words)
    shared: dict[str, Any] = {
        "encoder": c.encoder,
        "connector": c.connector,
        "decoder": c.decoder,
        "experts": c.experts,
        "data": c.data,
        "seed": c.seed,
    }
    joint = PretrainConfig(
        image_size=c.image_size, pretrain=c.pretraining, files=_of(files, *c.pretraining.mixture.used), **shared
    )
    model = Stage("pretrain", joint, seed=c.seed, parents=parents)
    if c.finetune is not None:
        tuned = FinetuneConfig(finetune=c.finetune, files=_of(files, "instruction"), **shared)
        model = Stage("finetune", tuned, seed=c.seed, parents={"model": model, **words})
    tests = [f"{name}/{split}" for name in _image_tasks(c) for split in ("train", "test")]
    last = EvaluateConfig(
        image_size=c.image_size if c.finetune is None else c.finetune.image_size,
        sub_images=c.finetune is not None and c.finetune.sub_images and (c.split_last or True),
        tuned=c.finetune is not None,
        eval=c.eval,
        tasks={name: task_fingerprint(name, tasks_dir=TASKS, data_dir=data_root()) for name in c.eval.text_tasks},
        files=_of(files, *tests),
        **shared,
    )
    return Stage("evaluate", last, seed=c.seed, parents={"model": model, **words})


def _choice(c: MM1Config, rates: Rates) -> Stage:
    """The same experiment at every learning rate, and the choice among them (Section 3.2)."""
    parents = {}
    for index, rate in enumerate(rates.learning_rates):
        optim = c.pretrain.optim.model_copy(update={"learning_rate": rate})
        pretrain = c.pretrain.model_copy(update={"optim": optim})
        parents[f"rate_{index}"] = stages(c.model_copy(update={"pretrain": pretrain, "rates": None}))
    chosen = ChooseConfig(
        rates=rates,
        metric=f"mmcore_{max(c.eval.shots)}/mean",
        num_parameters=cost.counted(c.decoder.shape, 0).parameters,
        seed=c.seed,
    )
    return Stage("choose_rate", chosen, seed=c.seed, parents=parents)


def _law(c: MM1Config, rates: Rates) -> Stage:
    """That choice for every decoder size, and the law through the sizes."""
    parents, each = {}, rates.model_copy(update={"law": False})
    for name in Decoders.model_fields:
        decoder = c.decoder.model_copy(update={"shape": getattr(c.sizes.decoders, name)})
        parents[name] = _choice(c.model_copy(update={"decoder": decoder, "rates": each}), each)
    sizes = {name: stage.config.num_parameters for name, stage in parents.items()}  # type: ignore[attr-defined]
    return Stage("fit_law", LawConfig(num_parameters=sizes, seed=c.seed), seed=c.seed, parents=parents)


def _tokenizer(c: MM1Config, files: dict[str, str]) -> dict[str, Stage]:
    """Of real text, where the decoder brings none."""
    if not isinstance(c.data, Corpora) or isinstance(c.decoder, PretrainedDecoder):
        return {}
    return {"tokenizer": Stage("prepare", TokenizerConfig(data=c.data, files=_of(files, "text")), seed=0)}


def _image_tasks(c: MM1Config) -> list[str]:
    return list(c.data.tasks) if isinstance(c.data, Corpora) else []


def _fingerprints(c: MM1Config) -> dict[str, str]:
    """Of the local corpora that are here, by what they are for; a plan needs none of them."""
    found: dict[str, str] = {}
    for name, corpus in (c.data.every() if isinstance(c.data, Corpora) else {}).items():
        try:
            found[name] = corpora.fingerprint(corpus)
        except ValueError:
            continue
    return found


def _of(files: dict[str, str], *names: str) -> dict[str, str]:
    return {name: files[name] for name in names if name in files}


def check(config: MM1Config) -> None:
    """Raise ValueError for data, tasks and weights out of reach.

    And for batches that the machine's processes can't share evenly.
    """
    c, processes = config, config.hardware.processes
    if c.rates is not None and c.rates.law and isinstance(c.decoder, PretrainedDecoder):
        raise ValueError("rates.law=true: its decoders are made here (sizes.decoders): use decoder.kind=scratch")
    optims = {"pretrain.optim": c.pretrain.optim}
    if isinstance(c.encoder, ScratchEncoder):
        optims["encoder.optim"] = c.encoder.optim
    if isinstance(c.decoder, ScratchDecoder):
        optims["decoder.optim"] = c.decoder.optim
    if c.finetune is not None:
        optims["finetune.optim"] = c.finetune.optim
    for key, optim in optims.items():
        optim.check_processes(processes, key=key)
    if isinstance(c.data, Corpora):
        every = c.data.every()
        unused = set(c.data.sources) - set(c.used_sources)
        if c.finetune is None:
            unused.add("instruction")  # type: ignore[arg-type]
        for name, corpus in every.items():
            if name not in unused:
                corpora.check(corpus)
        for name, task in c.data.tasks.items():
            _check_demonstrations(name, task, c.eval.shots)
    validate_tasks(c.eval.text_tasks, tasks_dir=TASKS, data_dir=data_root(), generated={}, probe_hub=True)
    for part in (c.encoder, c.decoder):
        if isinstance(part, PretrainedEncoder | PretrainedDecoder):
            require_weights(Path(part.place()))
            if Path(part.place()).is_dir():
                part.check()
            else:
                require_hub(part.name, "download it where it can be reached, and name the folder instead")


def _check_demonstrations(name: str, task: ImageTask, shots: tuple[int, ...]) -> None:
    """Raise ValueError for more shots than a training split on this machine has items; reads no more than those."""
    if isinstance(task.train, HubDataset):
        return  # its rows would be fetched
    rows = chain.from_iterable(shard.rows(0) for shard in task.train.shards())
    try:
        found = len(list(islice(rows, max(shots))))
    except EndsEarly as error:
        raise ValueError(f"data.tasks.{name}.train: ends early ({error}): get it anew") from error
    if found < max(shots):
        raise ValueError(
            f"eval.shots={[*shots]}: data.tasks.{name}.train has {found} items to take demonstrations from: ask for "
            "fewer shots, or add some"
        )
