"""How good a language model is: perplexity, distance from a reference, multiple choice."""
