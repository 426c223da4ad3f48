"""Models in the layout of Hugging Face's transformers: a folder with config.json and safetensors, in and out.

``names`` is the one table of tensors, used both ways; ``config`` translates config.json both ways; ``folder`` looks at
a folder and finds all that is wrong with it; ``tokenizer`` lays one into a folder; ``weights`` reads slices. Only the
last needs numpy.
"""
