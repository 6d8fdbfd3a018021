"""Models of Hugging Face's format, in and out: config.json, tokenizer.json and safetensors.

`families` says what is supported, one row for each; `architecture` reads config.json by a row, and writes it; `tensors`
sets names and layouts side by side; `source` reads a directory, `importing` and `exporting` make one of another.
"""
