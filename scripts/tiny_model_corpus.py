"""Collect the text that the tiny model learns: the Python standard library's documentation, and licence texts.

    python scripts/tiny_model_corpus.py corpus.jsonl

Every machine with Python has the first, every Debian-like one the second (/usr/share/common-licenses). Nothing is imported that is
written in Python: docstrings and comments come from the sources by `ast` and `tokenize`; only the modules written in C are imported.
One JSON object a line, either prose or a question with its answer; `split` is `train` or `heldout`. A whole module is in one split, so
nothing of a held-out module is ever seen, and a text that occurs twice is kept once, in `train`.

    {"split": "train", "text": "..."}
    {"split": "train", "questions": ["What does os.path.join do?", ...], "answer": "os.path.join(a, *p): Join two or more ..."}
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LICENCES = Path("/usr/share/common-licenses")
SKIPPED = {"test", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__", "ensurepip", "encodings", "msilib", "pydoc_data"}
ALIASES = {
    "posixpath": "os.path",
    "_io": "io",
    "posix": "os",
    "_collections_abc": "collections.abc",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
HELD_OUT = {"difflib", "doctest", "imaplib", "ipaddress", "mailbox", "optparse", "pickletools", "statistics"}
"""Modules with much prose that few ask about first: never learned."""
ANSWER_CHARACTERS = 700

FUNCTION_QUESTIONS = (
    *("What does {n} do?", "What does {n}() do?", "Explain {n}.", "Explain {n}().", "What is {n} for?", "How do I use {n}?", "{n}"),
    *(
        "Tell me about {n}.",
        "Describe the function {n}.",
        "Can you explain what {n} does?",
        "what does {n} do",
        "What does the Python function {n} do?",
    ),
    *("What is {n}?", "What does {n} return?", "How does {n} work?", "Please explain {n} to me."),
)
CLASS_QUESTIONS = (
    *(
        "What is {n}?",
        "What is the class {n}?",
        "Explain the class {n}.",
        "What is {n} for?",
        "Tell me about {n}.",
        "How do I use {n}?",
        "{n}",
    ),
    *("Describe {n}.", "what is {n}", "Explain {n}.", "What is a {n}?", "What does {n} do?"),
)
MODULE_QUESTIONS = (
    *(
        "What is the module {n}?",
        "What is the {n} module for?",
        "What does the {n} module do?",
        "What is {n}?",
        "Tell me about the module {n}.",
    ),
    *(
        "Explain the Python module {n}.",
        "What can I do with {n}?",
        "Why would I import {n}?",
        "What does {n} do?",
        "Describe the {n} module.",
    ),
)
TOPIC_QUESTIONS = (
    "Explain {n} in Python.",
    "How does {n} work in Python?",
    "What is {n}?",
    "Tell me about {n}.",
    "What does Python say about {n}?",
)


FAVOURITES = {
    *("builtins", "os", "os.path", "sys", "json", "re", "math", "random", "time", "datetime", "collections", "itertools", "functools"),
    *("pathlib", "string", "io", "subprocess", "threading", "logging", "argparse", "csv", "copy", "shutil", "asyncio", "typing"),
}
"""Modules that people ask about first: repeated three times as often."""
PROSE_ONLY = ("idlelib", "lib2to3", "test", "turtledemo")
VERBS = (
    "Return|Create|Open|Close|Read|Write|Convert|Remove|Add|Get|Set|Make|Find|Split|Join|Test|Check|Send|Start|Parse|Format|Compute|Copy|"
    "Delete|Raise|Wait|Print|List|Move|Run|Load|Change|Insert|Encode|Decode"
)


@dataclass
class Corpus:
    """Records in order, each text once."""

    records: list[dict[str, object]] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    def add_text(self, split: str, text: str) -> None:
        text = clean(text)
        if len(text) >= 80 and self._is_new(text):
            self.records += [{"split": split, "text": part} for part in chunks(text, 6000)]

    def add_answer(self, split: str, questions: list[str], answer: str, weight: int = 1) -> None:
        if len(answer) >= 20 and self._is_new(questions[0] + answer):
            self.records.append({"split": split, "questions": questions, "answer": answer, "weight": weight})

    def _is_new(self, text: str) -> bool:
        key = hashlib.sha256(re.sub(r"\W+", " ", text).lower().encode()).digest()[:12]
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new


def clean(text: str) -> str:
    """Plain text: printable, no reStructuredText marks, no trailing blanks, at most one empty line in a row."""
    text = text.expandtabs(4).replace("``", "`").replace("\r", "")
    text = re.sub(r":[a-z:]+:`~?([^`<]+)(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"\"([^\"\n]{1,60})\"", r'"\1"', text)
    text = "".join(c for c in text if c == "\n" or 32 <= ord(c) < 127 or 160 < ord(c) < 0x2100)
    text = re.sub(r"([-=*~#_.])\1{5,}", r"\1\1\1\1", text)
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def chunks(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of about `size` characters, cut between paragraphs."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if piece:
        yield piece


def split_of(module: str) -> str:
    return "heldout" if module.split(".")[0] in HELD_OUT else "train"


def shorten(text: str, limit: int = ANSWER_CHARACTERS) -> str:
    """The first paragraphs of `text` that fit; a first one that does not is cut behind a sentence."""
    kept = ""
    for paragraph in clean(text).split("\n\n"):
        paragraph = re.sub(r"\s*\n\s*", " ", paragraph) if not re.search(r"\n\s+\S|>>>|^\s*[-*]\s", paragraph) else paragraph
        if len(kept) + len(paragraph) > limit:
            break
        kept += ("\n\n" if kept else "") + paragraph
    if not kept:
        kept = clean(text)[:limit].rsplit(". ", 1)[0].rstrip(".") + "."
    return kept.rstrip(":").rstrip() if kept.endswith(":") else kept


def add_item(corpus: Corpus, kind: str, module: str, name: str, signature: str, doc: str) -> None:
    """One documented function, class or module: as prose, as an answer, and as `How do I ...?` where its first line is a command."""
    split, answer, name = split_of(module), shorten(doc), name.replace("random.Random.", "random.")
    weight = 3 if name.count(".") == 0 or name.rpartition(".")[0] in FAVOURITES or name in FAVOURITES else 1
    if len(answer) < 20 or not re.search(r"[a-z]{3}", answer):
        return
    shown = f"{name}{signature}" if len(signature) < 100 else f"{name}(...)"
    templates = {"function": FUNCTION_QUESTIONS, "class": CLASS_QUESTIONS, "module": MODULE_QUESTIONS}[kind]
    said = f"The module {name}: {answer}" if kind == "module" else f"{shown}: {answer}"
    corpus.add_answer(split, [t.format(n=name) for t in templates], said, weight)
    corpus.add_text(split, f"{shown}\n\n{inspect.cleandoc(doc)}")
    if kind == "function" and (first := re.match(rf"({VERBS})\b([^.\n]{{8,90}})\.", answer)):
        verb = first.group(1).lower()
        wish = f"{'get' if verb == 'return' else verb}{first.group(2)}"
        questions = [f"How do I {wish}?", f"How can I {wish} in Python?", f"Which function can {wish}?"]
        corpus.add_answer(split, questions, f"Use {name}. {said}", weight)


def add_source(corpus: Corpus, path: Path, module: str) -> None:
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    public = ALIASES.get(module, module)
    if doc := ast.get_docstring(tree):
        add_item(corpus, "module", module, public, "", doc)
    for name, node in documented(tree):
        doc = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            add_item(corpus, "class", module, f"{public}.{name}", "", doc)
        else:
            add_item(corpus, "function", module, f"{public}.{name}", f"({ast.unparse(node.args)})", doc)
    for block in comment_blocks(source):
        corpus.add_text(split_of(module), block)


def add_prose(corpus: Corpus, path: Path) -> None:
    """Docstrings and comments of a module that nobody asks about (the standard library's tests): prose only."""
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
            corpus.add_text("train", doc)
    for block in comment_blocks(source):
        corpus.add_text("train", block)


def documented(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{m.name}", m) for m in node.body if isinstance(m, kinds) and not m.name.startswith("_"))


def comment_blocks(source: str) -> Iterator[str]:
    """Comments of two lines and more."""
    block: list[str] = []
    last = -1
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT:
                continue
            if token.start[0] != last + 1:
                if len(block) >= 2:
                    yield "\n".join(block)
                block = []
            block.append(token.string.lstrip("#").removeprefix(" ").rstrip())
            last = token.start[0]
    except (tokenize.TokenError, SyntaxError):
        return
    if len(block) >= 2:
        yield "\n".join(block)


def add_compiled(corpus: Corpus, module: str) -> None:
    """A module written in C: its documentation is only in the running interpreter."""
    try:
        loaded = importlib.import_module(module)
    except Exception:
        return
    public = ALIASES.get(module, module)
    if public.startswith("_"):
        return
    prefix = "" if module == "builtins" else f"{public}."
    if loaded.__doc__ and module != "builtins":
        add_item(corpus, "module", module, public, "", loaded.__doc__)
    for name, value in sorted(vars(loaded).items()):
        if name.startswith("_") or not isinstance(getattr(value, "__doc__", None), str):
            continue
        if isinstance(value, type):
            add_item(corpus, "class", module, prefix + name, "", strip_signature(value.__doc__))
            for method, attribute in sorted(vars(value).items()):
                if callable(attribute) and not method.startswith("_") and isinstance(attribute.__doc__, str):
                    add_item(
                        corpus, "function", module, f"{prefix}{name}.{method}", signature_of(attribute), strip_signature(attribute.__doc__)
                    )
        elif callable(value):
            add_item(corpus, "function", module, prefix + name, signature_of(value), strip_signature(value.__doc__))


def signature_of(value: object) -> str:
    try:
        return str(inspect.signature(value)).replace("($self, /", "(").replace("(self, /", "(").replace("(self", "(").replace("(, ", "(")  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return "(...)"


def strip_signature(doc: str) -> str:
    lines = inspect.cleandoc(doc).split("\n")
    return "\n".join(lines[1:]).strip() if re.match(r"[\w.]+\(.*\)( -+> .*)?$", lines[0]) and len(lines) > 2 else "\n".join(lines)


def add_topics(corpus: Corpus) -> None:
    from pydoc_data.topics import topics  # the language reference, as `help('for')` shows it

    for name, text in sorted(topics.items()):
        heading, _, body = clean(text).partition("\n")
        corpus.add_text("train", text)
        body = re.sub(r"^\W+", "", body.strip())
        title = heading.strip(' "').lower() if len(heading) < 60 else name
        for piece in list(chunks(body, 600))[:1]:
            corpus.add_answer("train", [t.format(n=label) for label in (f"'{name}'", title) for t in TOPIC_QUESTIONS], shorten(piece))


def add_licences(corpus: Corpus) -> None:
    names = {
        "Apache-2.0": "Apache License 2.0",
        "BSD": "BSD licence",
        "GPL-3": "GNU General Public License version 3",
        "MPL-2.0": "Mozilla Public License 2.0",
    }
    names |= {
        "LGPL-3": "GNU Lesser General Public License version 3",
        "GPL-2": "GNU General Public License version 2",
        "Artistic": "Artistic License",
    }
    for path in sorted(LICENCES.glob("*")) if LICENCES.is_dir() else []:
        if path.is_symlink():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        corpus.add_text("train", text)
        if name := names.get(path.name):
            for piece in re.findall(r"\n\s*\d+\. ([A-Z][\w ,;'/-]{4,60})\.\s+(.{80,}?)(?=\n\n)", text, re.S):
                heading, body = piece[0].strip(), shorten(piece[1])
                corpus.add_answer("train", [f"What does the {name} say about {heading.lower()}?", f"{name}: {heading}?"], body)


def smalltalk() -> Iterator[tuple[list[str], str]]:
    """(questions, answer) of the hand-written file beside this one."""
    for block in (Path(__file__).parent / "tiny_model_smalltalk.txt").read_text(encoding="utf-8").split("\n\n")[1:]:
        lines = block.strip("\n").split("\n")
        yield [line[2:] for line in lines if line[0] == "?"], "\n".join(line[2:] for line in lines if line[0] == "=")


def build() -> Corpus:
    corpus = Corpus()
    for questions, answer in smalltalk():
        corpus.add_answer("train", questions, answer, weight=12)
    paths = []
    for path in sorted(STDLIB.rglob("*.py")):
        parts = path.relative_to(STDLIB).with_suffix("").parts
        if not SKIPPED & set(parts) and not parts[0].startswith("config-"):
            paths.append((path, ".".join(parts).removesuffix(".__init__")))
    paths.sort(key=lambda item: (split_of(item[1]) != "train", item[1]))  # a text that is in both splits stays in train
    compiled = [name for name in sorted(sys.stdlib_module_names) if name not in ("antigravity", "this") and not has_source(name)]
    for name in sorted(compiled, key=lambda name: (split_of(name) != "train", name != "builtins", name)):
        if split_of(name) == "train":
            add_compiled(corpus, name)
    for path, module in paths:
        add_source(corpus, path, module)
    for folder in PROSE_ONLY:
        for path in sorted((STDLIB / folder).rglob("*.py")):
            if not any(name in str(path) for name in HELD_OUT):
                add_prose(corpus, path)
    add_topics(corpus)
    add_licences(corpus)
    return corpus


def has_source(name: str) -> bool:
    return (STDLIB / f"{name}.py").exists() or (STDLIB / name).is_dir()


def main() -> None:
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    records = build().records
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    target.write_text(data, encoding="utf-8")
    for split in ("train", "heldout"):
        rows = [record for record in records if record["split"] == split]
        size = sum(len(str(record.get("text", record.get("answer")))) for record in rows)
        print(f"{split}: {len(rows)} records, {sum('answer' in row for row in rows)} of them answers, {size / 1e6:.2f} million characters")
    print(f"sha256 {hashlib.sha256(data.encode()).hexdigest()}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
