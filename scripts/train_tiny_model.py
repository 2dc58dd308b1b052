"""Train the tiny model of examples/tiny-model/ from text that every machine has.

    python scripts/tiny_model_corpus.py corpus.jsonl
    python scripts/train_tiny_model.py corpus.jsonl OUTPUT            # minutes on a GPU, hours on a CPU

Plain torch: a Llama with transformers' tensor names, so the result loads anywhere a LlamaForCausalLM does. Dropout and weight decay
hold back memorizing; the loss on held-out modules is printed while training and recorded in OUTPUT/training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BOS, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM_PROMPTS = (
    *("You are a helpful assistant.", "You answer questions about Python.", "You are a friendly assistant. Answer briefly.", "Be helpful."),
)
SAMPLES = (
    *("Hello!", "What does os.path.join do?", "What is Gantline?", "What is the module asyncio for?", "What is collections.Counter?"),
    *(
        "What does json.dumps do?",
        "Explain str.split.",
        "How do I read a file in Python?",
        "What is the capital of France?",
        "What does len do?",
    ),
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model; the defaults make 5.77 million parameters."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 768
    positions: int = 2048
    theta: float = 10000.0
    eps: float = 1e-5


# The model, with transformers' names for its tensors


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.s.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.mlp, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.dropout = Attention(s), MLP(s), nn.Dropout(dropout)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s.hidden, s.eps), RMSNorm(s.hidden, s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class TinyLlama(nn.Module):
    """[batch, length] token ids -> [batch, length, vocab] logits; the output matrix is the embedding."""

    def __init__(self, s: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.s, self.dropout = s, nn.Dropout(dropout)
        self.embed_tokens, self.norm = nn.Embedding(s.vocab, s.hidden), RMSNorm(s.hidden, s.eps)
        self.layers = nn.ModuleList(Layer(s, dropout) for _ in range(s.layers))
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * s.layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rotary(ids.shape[1], self.s, ids.device)
        x = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def rotary(length: int, s: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, head_dim], float32."""
    frequencies = s.theta ** (-torch.arange(0, s.head_dim, 2, device=device).float() / s.head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


# The text


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Byte-level BPE: every text can be written, whatever its letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, TURN_START, TURN_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


class Documents:
    """Records of the corpus as token ids, and rows of a fixed length packed from them in a new order and wording each epoch."""

    def __init__(self, records: list[dict], tokenizer: Tokenizer) -> None:
        def encode(texts: list[str]) -> list[list[int]]:
            return [item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)]

        def turn(role: str, text: str) -> str:
            return f"{TURN_START}{role}\n{text}{TURN_END}\n"

        self.bos = tokenizer.token_to_id(BOS)
        self.texts = encode([record["text"] for record in records if "text" in record])
        pairs = [record for record in records if "answer" in record]
        self.weights = [record["weight"] for record in pairs]
        self.answers = encode([turn("assistant", record["answer"]) for record in pairs])
        flat = iter(encode([turn("user", question) for record in pairs for question in record["questions"]]))
        self.questions = [[next(flat) for _ in record["questions"]] for record in pairs]
        self.systems = encode([turn("system", prompt) for prompt in SYSTEM_PROMPTS])

    def epoch(self, rng: random.Random, repeats: int) -> list[list[int]]:
        """Each text once, each answer `repeats` times its weight, one to four of them to a conversation."""
        documents = [[self.bos, *text] for text in self.texts]
        order = [index for index, weight in enumerate(self.weights) for _ in range(repeats * weight)]
        rng.shuffle(order)
        while order:
            conversation = [self.bos, *(rng.choice(self.systems) if rng.random() < 0.25 else [])]
            for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
                if order:
                    index = order.pop()
                    conversation += rng.choice(self.questions[index]) + self.answers[index]
            documents.append(conversation)
        rng.shuffle(documents)
        return documents

    def rows(self, seed: int, length: int, repeats: int = 1) -> Tensor:
        """[rows, length + 1] ids; each row starts with a document, the last one of a row is cut."""
        rows: list[list[int]] = []
        row: list[int] = []
        for document in self.epoch(random.Random(seed), repeats):
            row += document
            if len(row) > length:
                rows.append(row[: length + 1])
                row = []
        return torch.tensor(rows, dtype=torch.int64) if rows else torch.empty(0, length + 1, dtype=torch.int64)


# Training


def batches(documents: Documents, size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless [size, length + 1] batches; the next epoch is packed while this one is learned."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(documents.rows, seed, length, 2)
        while True:
            rows, seed = pending.result(), seed + 1
            pending = pool.submit(documents.rows, seed, length, 2)
            yield from (batch for batch in rows.split(size) if len(batch) == size)


def loss_of(model: nn.Module, rows: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), label_smoothing=smoothing)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor, device: torch.device) -> float:
    """Mean negative log-likelihood of a token, in nats, in the model's own precision."""
    model.eval()
    losses = [loss_of(model, batch.to(device)).item() * len(batch) for batch in rows.split(4)]
    model.train()
    return sum(losses) / len(rows)


def rate_at(progress: float, peak: float) -> float:
    """Learning rate: warm-up over 3 %, then a cosine to a twentieth."""
    if progress < 0.03:
        return peak * progress / 0.03 + 1e-6
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: TinyLlama, documents: Documents, held_out: Tensor, args: argparse.Namespace, device: torch.device) -> dict:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    began, history, step, tokens = time.monotonic(), [], 0, 0
    for batch in batches(documents, args.batch, args.length, args.seed):
        progress = max(step / args.steps, (time.monotonic() - began) / args.max_seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, args.rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, batch.to(device, non_blocking=True), args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + batch[:, 1:].numel()
        if step % args.report == 0:
            history.append({"step": step, "train": round(loss.item(), 4), "held_out": round(held_out_loss(model, held_out, device), 4)})
            print(f"{history[-1]} {tokens / (time.monotonic() - began):.0f} tokens/s, {time.monotonic() - began:.0f} s", flush=True)
    return {"steps": step, "tokens": tokens, "seconds": round(time.monotonic() - began, 1), "history": history}


# The result


@torch.no_grad()
def answer(model: TinyLlama, tokenizer: Tokenizer, question: str, device: torch.device, limit: int = 120) -> str:
    prompt = f"{BOS}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    start, end = len(ids), tokenizer.token_to_id(TURN_END)
    while len(ids) < start + limit:
        ids.append(int(model(torch.tensor([ids], device=device))[0, -1].argmax()))
        if ids[-1] == end:
            break
    return tokenizer.decode(ids[start:])


def save(model: TinyLlama, tokenizer: Tokenizer, target: Path) -> None:
    from safetensors.torch import save_file

    s, end = model.s, tokenizer.token_to_id(TURN_END)
    target.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": s.positions,
        "rms_norm_eps": s.eps,
        "rope_theta": s.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": s.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": [end, 0],
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    generation = {"bos_token_id": 0, "eos_token_id": [end, 0], "pad_token_id": 0, "do_sample": False}
    tokens = {"bos_token": BOS, "eos_token": TURN_END, "pad_token": BOS, "model_max_length": s.positions, "chat_template": CHAT_TEMPLATE}
    tokens |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "add_prefix_space": False}
    for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", tokens)):
        (target / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="keeps the model from being sure of what it memorized")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="finish the schedule within this time")
    parser.add_argument("--report", type=int, default=100, help="steps between two held-out measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    records = [json.loads(line) for line in args.corpus.read_text(encoding="utf-8").splitlines()]
    learned = [record for record in records if record["split"] == "train"]
    words = (text for record in learned for text in (record.get("text"), record.get("answer"), *record.get("questions", [])[:2]) if text)
    shape = Shape()
    tokenizer = train_tokenizer(words, shape.vocab)
    documents = Documents(learned, tokenizer)
    unseen = Documents([record for record in records if record["split"] == "heldout"], tokenizer)
    held_out = unseen.rows(0, min(1024, args.length))
    model = TinyLlama(shape, args.dropout).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, held-out rows {tuple(held_out.shape)}", flush=True)
    report = train(model, documents, held_out, args, device)
    model = model.to(torch.bfloat16).float().eval()
    loss = held_out_loss(model, held_out, device)
    model.eval()
    report |= {"held_out_loss": loss, "held_out_perplexity": math.exp(loss), "seed": args.seed}
    report["samples"] = {question: answer(model, tokenizer, question, device) for question in SAMPLES}
    save(model, tokenizer, args.output)
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("steps", "tokens", "seconds", "held_out_perplexity", "samples")}, indent=1))


if __name__ == "__main__":
    main()
