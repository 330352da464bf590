"""Makes the small vocabularies and vectors of this folder (see README.md).

    python make.py ../../../shared/models/tokenizers

Python packages: tokenizers 0.23.3 (built with Oniguruma), gguf. The texts to train on and to encode are
texts.json of that folder; nothing is taken from a published vocabulary but the patterns.
"""
import json
import pathlib
import re
import sys

import gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
MERGES = 450
EAST = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
ELISION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]")
LETTERS = "À Á õ ö ÷ ø ù ú û ü ý þ ÿ".split()
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]

# pre: patterns (None: single digits), control tokens, user-defined tokens, add_bos, names of the tokens that end a text
SPECS = {
    "deepseek-llm": dict(
        split="as in ../shapes/v3-like-hf/tokenizer.json",
        control=DEEPSEEK, user=[], add_bos=True, ends=[DEEPSEEK[1]]),
    "deepseek-coder": dict(
        split=["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST, None],
        control=DEEPSEEK + ["<pad>", "<|User|>", "<|EOT|>"], user=LETTERS, add_bos=True, ends=[DEEPSEEK[1]]),
    "deepseek-v3": dict(
        split=[r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
               r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*""" + BLANKS],
        control=DEEPSEEK, user=["<think>", "</think>"], add_bos=True, ends=[DEEPSEEK[1]]),
    "glm4": dict(
        split=[ELISION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + BLANKS], whole=True,
        control=["[gMASK]", "<|endoftext|>", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"],
        user=["<think>", "</think>", "<tool_call>", "/nothink"], add_bos=False, ends=["<|endoftext|>", "<|user|>", "<|observation|>"],
        ids={"eot": "<|user|>", "eom": "<|observation|>"}),
    "kimi-k2": dict(
        split=[r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + ELISION + r"?|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + ELISION
               + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + BLANKS], whole=True, no_merges=True,
        control=["[BOS]", "[EOS]", "<|im_end|>", "[EOT]", "<|im_user|>", "<|im_middle|>", "[PAD]"], user=[], add_bos=False,
        ends=["[EOS]", "<|im_end|>", "[EOT]", "[PAD]"]),
}


def pre_tokenizer(split):
    steps = [pre_tokenizers.Digits(individual_digits=True) if p is None else pre_tokenizers.Split(Regex(p), "isolated") for p in split]
    return pre_tokenizers.Sequence(steps + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(spec, texts):
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in spec["user"]]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizer(spec["split"])
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(texts, trainer)
    doc = json.loads(tok.to_str())
    vocab = doc["model"]["vocab"]
    if spec.get("whole"):
        # entries that no merge makes: reached only as whole pieces
        for text in ["whole", " whole", " èĢĮ"]:
            vocab.setdefault(text.replace(" ", "Ġ"), len(vocab))
    doc["model"]["ignore_merges"] = bool(spec.get("whole"))
    at = len(vocab)
    doc["added_tokens"] = [
        dict(id=at + i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=t in spec["control"])
        for i, t in enumerate(spec["control"] + spec["user"])]
    return doc


def write_gguf(name, spec, doc):
    tokens = [t for t, _ in sorted(doc["model"]["vocab"].items(), key=lambda e: e[1])]
    types = [1] * len(tokens) + [3] * len(spec["control"]) + [4] * len(spec["user"]) + [5] * 3
    tokens += spec["control"] + spec["user"]
    tokens += ["[PAD%d]" % (len(tokens) + i) for i in range(3)]
    ids = {t: i for i, t in enumerate(tokens)}
    w = gguf.GGUFWriter(str(HERE / ("vocab-%s.gguf" % name)), "deepseek2")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(name)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if not spec.get("no_merges"):
        w.add_token_merges([" ".join(m) for m in doc["model"]["merges"]])
    w.add_bos_token_id(ids[spec["control"][0]])
    w.add_eos_token_id(ids[spec["control"][1]])
    for key, text in spec.get("ids", {}).items():
        getattr(w, "add_%s_token_id" % key)(ids[text])
    if spec["add_bos"]:
        w.add_add_bos_token(True)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    return tokens, ids


def write_directory(name, spec, doc, ids, size):
    """The same vocabulary as a Hugging Face directory, with flags as the publishers set them."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    doc = json.loads(json.dumps(doc))
    for added in doc["added_tokens"]:
        added["special"] = added["special"] and not re.fullmatch("<[|｜].*[|｜]>", added["content"]) or added["content"] in spec["control"][:2]
    dump = lambda file, value: (folder / file).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    dump("tokenizer.json", doc)
    bos, eos = spec["control"][:2]
    dump("tokenizer_config.json", {"add_bos_token": spec["add_bos"], "bos_token": {"content": bos}, "eos_token": eos, "chat_template": "{{ bos_token }}"})
    dump("config.json", {"bos_token_id": 0, "eos_token_id": sorted(ids[t] for t in spec["ends"]), "vocab_size": size})


def publisher_split(shared):
    """deepseek-llm's patterns, whose letters are best not retyped."""
    doc = json.loads((pathlib.Path(shared) / "../shapes/v3-like-hf/tokenizer.json").read_text(encoding="utf-8"))
    steps = doc["pre_tokenizer"]["pretokenizers"][:-1]
    return [step["pattern"]["Regex"] if step["type"] == "Split" else None for step in steps]


def main(shared):
    SPECS["deepseek-llm"]["split"] = publisher_split(shared)
    rows = json.loads((pathlib.Path(shared) / "texts.json").read_text(encoding="utf-8"))
    chosen, seen = [], {}
    for row in rows:
        seen[row["cat"]] = seen.get(row["cat"], 0) + 1
        if row["cat"] != "new_unicode" and seen[row["cat"]] % 8 == 1 and len(row["text"]) <= 200:
            chosen.append(row["text"])
    chosen += [" whole whole 而 而", "Ü über ÿ", "".join(s + " x  " for s in DEEPSEEK + ["<think>", "[gMASK]<sop>", "<|user|>", "[EOT]", "<|im_user|>", "/nothink"])]
    for name, spec in SPECS.items():
        doc = train(spec, [row["text"] for row in rows])
        tokens, ids = write_gguf(name, spec, doc)
        write_directory(name, spec, doc, ids, len(tokens))
        tok = Tokenizer.from_str(json.dumps(doc))
        vectors = []
        for text in chosen:
            tok.encode_special_tokens = True
            plain = tok.encode(text, add_special_tokens=False).ids
            tok.encode_special_tokens = False
            vectors.append({"text": text, "ids": plain, "ids_special": tok.encode(text, add_special_tokens=False).ids})
        bos, eos = (ids[t] for t in spec["control"][:2])
        head = {"n_tokens": len(tokens), "info": {"bos": bos, "eos": eos, "add_bos": spec["add_bos"], "eog": sorted(ids[t] for t in spec["ends"])}}
        lines = ",\n".join(json.dumps(v, separators=(",", ":")) for v in vectors)
        (HERE / ("vectors-%s.json" % name)).write_text(json.dumps(head)[:-1] + ', "vectors": [\n' + lines + "\n]}\n", encoding="ascii")
        print(name, len(tokens), "tokens,", len(vectors), "texts")


if __name__ == "__main__":
    main(*sys.argv[1:])
