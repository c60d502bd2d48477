"""What a pretrained model knows, asked with a linear classifier on its frozen hidden states.

    python benchmarks/linear_probe.py --model_dir runs/bert/final runs/electra/final --csv authors.csv \
        --text text --label label --group work

A text is cut into windows of the model's length (equal parts, nothing is left out); its features are the last hidden
states, averaged over all of its tokens. They are standardised and given to a multinomial logistic regression. Five
folds, which keep the texts of a group together; how strongly the classifier is regularised is chosen by folds of the
same kind within the training part. No weight of the model changes.

Beside it, on the same folds: the most frequent label of the training part; logistic regression on TF-IDF of characters
(1- to 3-grams that at least two training texts have); and for every architecture the same model before any training,
which is what pretraining has to beat. Accuracy is over all texts, each classified once by a classifier that has seen no
text of its group; the interval is the middle 95 % of 10,000 bootstrap samples of whole groups. It covers the choice of
texts, not that of the folds or of the pretraining seed.

For an ELECTRA folder the discriminator is taken, for any masked language model the encoder without its head.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig

from lmscripts.evaluation.baselines import regress
from lmscripts.evaluation.downstream import mean_states

FOLDS, INNER_FOLDS = 5, 4
BOOTSTRAP_SAMPLES = 10_000
# Inverse strength of the regularisation.
STRENGTHS = {"model": (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "tf-idf": (1.0, 10.0, 100.0, 1000.0)}
Labels = NDArray[np.str_]
Indices = NDArray[np.int64]
# Indices of the training and of the test texts -> their features.
Features = Callable[[Indices, Indices], tuple[Any, Any]]


@dataclass(frozen=True)
class Table:
    """Labelled texts, N of them.

    Attributes:
        texts: the texts.
        labels: (N,) their labels.
        groups: (N,) which of them belong together.
    """

    texts: list[str]
    labels: Labels
    groups: Labels


def read_table(options: argparse.Namespace) -> Table:
    """The labelled texts.

    Raises:
        SystemExit: a column is missing, a text is empty, or there are too few groups for the folds.
    """
    csv.field_size_limit(1 << 30)
    with options.csv.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = (options.text, options.label, options.group)
        if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
            raise SystemExit(f"{options.csv} has no column {missing[0]!r}, only {', '.join(reader.fieldnames or [])}")
        rows = []
        for row in reader:
            rows.append([(row[name] or "").strip() for name in columns])
            if not all(rows[-1]):
                raise SystemExit(f"{options.csv}, line {reader.line_num}: text, label or group is empty")
    texts, labels, groups = ([row[column] for row in rows] for column in range(3))
    for label in sorted(set(labels)):
        if (found := len({group for group, own in zip(groups, labels) if own == label})) < FOLDS:
            raise SystemExit(f"{options.csv}: label {label!r} is in {found} groups, {FOLDS} folds need {FOLDS}")
    if len(set(labels)) < 2:
        raise SystemExit(f"{options.csv} has {len(set(labels))} labels, a classifier needs 2")
    return Table(texts, np.array(labels), np.array(groups))


def folds_of(table: Table, within: Indices, number: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Train and test indices of folds within some of the texts, groups kept together, labels spread evenly."""
    splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    parts = splitter.split(within, table.labels[within], table.groups[within])
    return [(within[train], within[test]) for train, test in parts]


def load_model(folder: Path, trained: bool, seed: int) -> torch.nn.Module:
    """The encoder of a folder, or one of the same architecture with fresh weights.

    Raises:
        SystemExit: the folder lacks weights of the encoder.
    """
    if not trained:
        torch.manual_seed(seed)
        return AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True)).eval()
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    # A pooler is on top of what is used here, and masked language models have none.
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise SystemExit(f"{folder} lacks {len(missing)} weights of the encoder, such as {missing[0]}")
    return model.eval()


def architecture(model: torch.nn.Module) -> dict[str, Any]:
    """What decides an untrained model: its configuration without where it came from."""
    unimportant = ("_name_or_path", "architectures", "transformers_version", "dtype")
    return {name: value for name, value in model.config.to_dict().items() if name not in unimportant}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that the folder names, else the one that belongs to the architecture.

    Beside the configuration of an architecture without a tokenizer of its own (ModernBERT) AutoTokenizer does not
    look for the named class if it has no tokenizer.json, as for Japanese. An empty configuration keeps it from this.
    """
    described = folder / "tokenizer_config.json"
    named = described.is_file() and "tokenizer_class" in json.loads(described.read_text(encoding="utf-8"))
    given = {"config": PretrainedConfig()} if named else {}
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **given)


def cut(ids: Sequence[int], longest: int) -> list[Sequence[int]]:
    """Equal parts, as few as can be, of at most `longest` ids."""
    bounds = np.linspace(0, len(ids), -(-len(ids) // longest) + 1).round().astype(int)
    return [ids[begin:end] for begin, end in pairwise(bounds)]


@dataclass(frozen=True)
class Windows:
    """Texts as token windows with the special tokens that a row of training has.

    Attributes:
        ids: of each of W windows.
        owners: the text of each.
        before: special tokens before the text.
        behind: special tokens behind the text.
    """

    ids: list[list[int]]
    owners: list[int]
    before: int
    behind: int


def windows_of(folder: Path, texts: Sequence[str]) -> Windows:
    """Cut texts into windows of the model's length.

    Raises:
        SystemExit: a text gives no token, or the tokenizer is not that of the model.
    """
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(f"{folder}: the tokenizer has {len(tokenizer)} entries, the model {config.vocab_size}")
    longest = min(config.max_position_embeddings, tokenizer.model_max_length)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        longest = min(config.max_position_embeddings - config.pad_token_id - 1, longest)
    before = [] if tokenizer.cls_token_id is None else [tokenizer.cls_token_id]
    behind = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
    windows, owners = [], []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise SystemExit(f"{folder}: the tokenizer gives no token for text {number + 1}, {text[:20]!r}")
        parts = cut(ids, longest - len(before) - len(behind))
        windows += [[*before, *part, *behind] for part in parts]
        owners += [number] * len(parts)
    # With files missing, transformers may make up a vocabulary of a few entries and say nothing.
    unknown = np.mean(np.concatenate(windows) == tokenizer.unk_token_id)
    if unknown > 0.2:
        raise SystemExit(f"{folder}: {unknown:.0%} of the tokens are unknown to the tokenizer")
    return Windows(windows, owners, len(before), len(behind))


def states_of(model: torch.nn.Module, windows: Windows, device: str) -> NDArray[np.float32]:
    """(N, H) last hidden states averaged over the tokens of each text."""
    model.to(device)
    around = windows.before, windows.behind
    texts = (windows.ids, windows.owners, around, max(windows.owners) + 1)
    return mean_states(lambda ids: model(input_ids=ids).last_hidden_state, *texts, device=device)


def features_of_model(states: NDArray[np.float32]) -> Features:
    """Standardised by the training part."""

    def features(train: Indices, test: Indices) -> tuple[Any, Any]:
        scaler = StandardScaler().fit(states[train])
        return scaler.transform(states[train]), scaler.transform(states[test])

    return features


def features_of_characters(texts: Sequence[str]) -> Features:
    """TF-IDF of character 1- to 3-grams, fitted on the training part and no other text.

    With fewer texts than n-grams the regression is solved in the space that the training texts span, where its
    solution lies: the same classifier, much faster.
    """
    counts = csr_matrix(CountVectorizer(analyzer="char", ngram_range=(1, 3), dtype=np.float32).fit_transform(texts))

    def features(train: Indices, test: Indices) -> tuple[Any, Any]:
        common = np.flatnonzero(counts[train].getnnz(0) >= 2)
        weigh = TfidfTransformer(sublinear_tf=True)
        seen, unseen = weigh.fit_transform(counts[train][:, common]), weigh.transform(counts[test][:, common])
        among, across = ((part @ seen.T).toarray().astype(np.float64) for part in (seen, unseen))
        scales, directions = np.linalg.eigh(among)
        kept = scales > 1e-6 * scales.max()
        basis = directions[:, kept] / np.sqrt(scales[kept])
        return among @ basis, across @ basis

    return features


def predict(train: Any, labels: Labels, test: Any, strengths: Sequence[float]) -> dict[float, Labels]:
    """Predictions for the test part by classifiers of each strength."""
    return {strength: regress(train, labels, test, strength, scaled=False) for strength in strengths}


def cross_validated(table: Table, features: Features, strengths: Sequence[float], seed: int) -> dict[str, Any]:
    """Predictions for every text by a classifier that saw none of its group.

    Returns:
        "predictions" (N,), and "strengths": what was chosen in each fold.
    """
    predictions = np.empty_like(table.labels)
    chosen = []
    for train, test in folds_of(table, np.arange(len(table.texts)), FOLDS, seed):
        correct = dict.fromkeys(strengths, 0)
        for inner_train, inner_test in folds_of(table, train, INNER_FOLDS, seed):
            seen, unseen = features(inner_train, inner_test)
            for strength, labels in predict(seen, table.labels[inner_train], unseen, strengths).items():
                correct[strength] += int((labels == table.labels[inner_test]).sum())
        best = max(strengths, key=lambda strength: correct[strength])
        seen, unseen = features(train, test)
        predictions[test] = predict(seen, table.labels[train], unseen, [best])[best]
        chosen.append(best)
    return {"predictions": predictions, "strengths": chosen}


def majority(table: Table, seed: int) -> dict[str, Any]:
    """The most frequent label of each training part."""
    predictions = np.empty_like(table.labels)
    for train, test in folds_of(table, np.arange(len(table.texts)), FOLDS, seed):
        names, counts = np.unique(table.labels[train], return_counts=True)
        predictions[test] = names[counts.argmax()]
    return {"predictions": predictions, "strengths": []}


def interval(correct: NDArray[np.bool_], groups: Labels, seed: int) -> tuple[float, float]:
    """Bounds of the middle 95 % of the accuracy over samples of whole groups."""
    _, group = np.unique(groups, return_inverse=True)
    sizes, hits = np.bincount(group), np.bincount(group, weights=correct)
    random = np.random.default_rng(seed)
    times = random.multinomial(sizes.size, np.full(sizes.size, 1 / sizes.size), BOOTSTRAP_SAMPLES)
    low, high = np.quantile((times @ hits) / (times @ sizes), [0.025, 0.975])
    return float(low), float(high)


def judge(name: str, table: Table, found: dict[str, Any], seconds: float, seed: int) -> dict[str, Any]:
    """One row of the result."""
    correct = found["predictions"] == table.labels
    low, high = interval(correct, table.groups, seed)
    folds = folds_of(table, np.arange(len(table.texts)), FOLDS, seed)
    return {
        "name": name,
        "accuracy": float(correct.mean()),
        "interval": [low, high],
        "folds": [float(correct[test].mean()) for _, test in folds],
        "strengths": found["strengths"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, nargs="+", required=True, help="folders with model and tokenizer")
    parser.add_argument("--csv", type=Path, required=True, help="table with a line of column names")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument("--group", default="work", help="column that says which texts belong together")
    parser.add_argument("--seed", type=int, default=0, help="of folds, bootstrap and untrained weights")
    parser.add_argument("--no_untrained", action="store_true", help="leave out the models before training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_file", type=Path, help="JSON with the results and the predictions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    table = read_table(options)
    for folder in options.model_dir:
        if not (folder / "config.json").is_file():
            raise SystemExit(f"{folder} is no model folder: it has no config.json")
    results: list[dict[str, Any]] = []

    def add(name: str, run: Callable[[], dict[str, Any]]) -> None:
        began = time.perf_counter()
        found = run()
        results.append(judge(name, table, found, time.perf_counter() - began, options.seed))
        results[-1]["predictions"] = found["predictions"].tolist()
        low, high = results[-1]["interval"]
        shown = f"{results[-1]['accuracy']:>8.1%}   {low:.1%} to {high:.1%}"
        print(f"{shown}   {results[-1]['seconds']:>7.1f}   {name}", flush=True)

    def classify(features: Features, kind: str) -> dict[str, Any]:
        # The matrices are small: a second BLAS thread does not help, and on a busy machine it costs 30 times the time.
        with threadpool_limits(1, user_api="blas"):
            return cross_validated(table, features, STRENGTHS[kind], options.seed)

    def probe(model: torch.nn.Module, windows: Windows) -> dict[str, Any]:
        return classify(features_of_model(states_of(model, windows, options.device)), "model")

    labels, groups = len(set(table.labels)), len(set(table.groups))
    print(f"{len(table.texts):,} texts, {labels} labels, {groups} groups, {FOLDS} folds; seed {options.seed}\n")
    print("accuracy   95 % interval    seconds   features", flush=True)
    add("most frequent label", lambda: majority(table, options.seed))
    characters = features_of_characters(table.texts)
    add("TF-IDF, 1-3 characters", lambda: classify(characters, "tf-idf"))
    untrained: list[tuple[dict[str, Any], Windows]] = []
    for folder in options.model_dir:
        model, windows = load_model(folder, True, options.seed), windows_of(folder, table.texts)
        add(str(folder), lambda model=model, windows=windows: probe(model, windows))
        kind = (architecture(model), windows)
        if not options.no_untrained and kind not in untrained:
            fresh = load_model(folder, False, options.seed)
            add(f"{folder}, untrained", lambda model=fresh, windows=windows: probe(model, windows))
            untrained.append(kind)
    if options.output_file:
        settings = {"csv": options.csv.name, "seed": options.seed, "folds": FOLDS, "strengths": STRENGTHS}
        options.output_file.write_text(
            json.dumps({"settings": settings, "results": results}, ensure_ascii=False, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
