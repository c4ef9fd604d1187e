"""Fine-tune a chat model on chats, by the config beside this script, and ask it something.

python examples/finetune_chat.py Qwen/Qwen2.5-0.5B-Instruct chats.jsonl   a model name or folder, and chats
python examples/finetune_chat.py --smoke                                  a tiny random model, on sums
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fundamentallm import create_tokenizer
from fundamentallm.train import main

CONFIG = str(Path(__file__).with_suffix(".yaml"))
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tiny_chats(path: str) -> str:
    """Write chats about sums, of one answer or two."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(200):
            a, b, c = number % 10, number // 10 % 10, number % 7
            chat = [("system", "Add the numbers."), ("user", f"{a} + {b}?"), ("assistant", f"{a + b}")]
            chat += [("user", f"And {c} more?"), ("assistant", f"{a + b + c}")] * (number % 2)
            messages = [{"role": role, "content": content} for role, content in chat]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def tiny_model(folder: str, text: str) -> str:
    """Write a model, its tokenizer and its chat template to a folder, in place of a download."""
    tokenizer = create_tokenizer("bpe:300", text, end_of_text="<|end|>")
    tokenizer.add_special_tokens(["<|start|>"])
    shape = LlamaConfig(
        vocab_size=301, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=tokenizer.token_to_id("<|end|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    special = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": TEMPLATE}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


arguments, output = sys.argv[1:], "runs/chat"
if arguments == ["--smoke"]:
    Path("runs").mkdir(exist_ok=True)
    chats, output = tiny_chats("runs/tiny_chats.jsonl"), "runs/chat_smoke"
    model = tiny_model("runs/tiny_chat_model", Path(chats).read_text(encoding="utf-8"))
    fast = {"training.max_steps": "30", "training.learning_rate": "1e-2", "training.mixed_precision": "no"}
    fast |= {"training.micro_batch_size": "16", "data.sequence_length": "128", "sample_tokens": "0"}
elif len(arguments) == 2:
    model, chats = arguments
    fast = {}
else:
    sys.exit(__doc__)

settings = {"model.pretrained": model, "data.source": chats, "output_dir": output, **fast}
code = main(["--config", CONFIG, *(word for name, value in settings.items() for word in (f"--{name}", value))])
if code:
    sys.exit(code)

# The checkpoint opens in peft and transformers, with the chat template.
(checkpoint, *_) = sorted(Path(output, "checkpoints").glob("step_*"), reverse=True)
tokenizer, trained = AutoTokenizer.from_pretrained(checkpoint), AutoPeftModelForCausalLM.from_pretrained(checkpoint)
question = [{"role": "system", "content": "Add the numbers."}, {"role": "user", "content": "3 + 4?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = trained.generate(**prompt, do_sample=False, max_new_tokens=10)[0, prompt["input_ids"].shape[1] :]
print(f"answer: {tokenizer.decode(answer, skip_special_tokens=True)}")
