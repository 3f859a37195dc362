"""Write a smaller copy of a model with its tokenizer: fewer layers, float32, and optionally a score head.

python benchmarks/cut_model.py .demo/SmolLM2-135M-Instruct OUT --layers 6
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--layers", type=int, default=0, help="keep the first layers; 0: all")
parser.add_argument("--score", action="store_true", help="a reward model, with a head from seed 0")
options = parser.parse_args()

torch.manual_seed(0)
depth = {"num_hidden_layers": options.layers} if options.layers else {}
score = {"num_labels": 1} if options.score else {}
kind = AutoModelForSequenceClassification if options.score else AutoModelForCausalLM
kind.from_pretrained(options.model, dtype=torch.float32, **depth, **score).save_pretrained(options.out)
AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
