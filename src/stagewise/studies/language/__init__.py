"""A small language model on text that every machine has: the source of Python's standard library.

What is real about it is the text and the training: a GPT-NeoX of Hugging Face, its Trainer with ordinary settings, a
tokenizer learnt from the text. The sharp stage is that of the study ``induction``; here it is reported what there is.

* ``text``: the library in tokens. ``classes``: what kind of token each one is. ``ngrams``: rules by counting.
* ``network``, ``training``: the model, its task and its runs. ``stages``: what it has learnt so far.
* ``settings``: how much is computed. ``lab``: the runs and results that experiments share, kept in a folder.
* ``influence``: of classes of tokens, exact.
* ``experiments/``: one a file, each takes the lab. ``study``: all of them on one page. ``cost``: how long it takes.
"""
