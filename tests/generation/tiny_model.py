"""A Llama small enough to be made on the spot: random weights, byte tokens, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CONTEXT = 256
"""Tokens the model can attend to."""


def write_tokenizer(folder: Path) -> Any:
    """A tokenizer of the 256 bytes, the word " the" and the special tokens; pad is not eos."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def write_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of 0.3M random parameters in float32, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # Far from uniform, so that a wrong mask, position or adapter changes the likeliest token.
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_reward_model(folder: Path, outputs: int = 1) -> Path:
    """A Llama of random weights that scores a conversation instead of going on with it."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = write_tokenizer(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=outputs,
        dtype="float32",
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, model_folder: Path, seed: int = 1) -> Path:
    """A LoRA adapter of rank 4 on attention and MLP, with random weights that change replies."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        # peft starts an adapter at zero, which would test nothing.
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(str(folder))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    return folder


class Reference:
    """The model's answers by transformers and arithmetic alone, to compare engines with."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(adapter))
        self.model.eval()

    def prompt(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(f"<|user|>{text}<|end|><|assistant|>"))

    def greedy(self, text: str, max_tokens: int) -> list[int]:
        """The likeliest token again and again, each from a fresh pass over all before it."""
        import torch

        tokens = self.prompt(text)
        start = len(tokens)
        while len(tokens) < start + max_tokens:
            with torch.no_grad():
                tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == self.tokenizer.eos_token_id:
                break
        return tokens[start:]

    def logprobs(self, text: str, answer: list[int]) -> Any:
        """Log-probabilities of every token after the prompt and each answer token, (A + 1, V)."""
        import torch

        prompt = self.prompt(text)
        with torch.no_grad():
            # From the end: virtual tokens stand before the prompt.
            logits = self.model(torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 :]
        return logits.log_softmax(-1)

    def logprob(self, text: str, answer: list[int]) -> float:
        """Sum over the answer's tokens, in nats, at temperature 1."""
        table = self.logprobs(text, answer)
        return float(sum(table[i, token] for i, token in enumerate(answer)))

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
