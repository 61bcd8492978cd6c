"""``oar plan``: will it fit, how long does it take, what does it cost, what happens when a node dies? Asked before a GPU is touched.

    shape        the recipe's model without its tokenizers: its spec, its parameters, its images
    activations  what the forward pass leaves for the backward pass, by formula     trace  the same, by running the model on fake tensors
    memory       everything a worker holds, for each ZeRO stage
    speed        the time of a step: operations, bytes between workers, bytes from storage
    traffic      bytes and requests that shards, checkpoints and orders cost the storage
    failures     checkpoint interval, and how much of the time is left for work, simulated
    extracting   orders for all images, and the evaluation
    streaming    who reads which shards: the real sample plan, asked
    cheaper      the same run on other settings

What is taken for granted (peaks, links, prices, rates of failure) lies in ``assumptions.yaml`` with its source and its date, is printed
with every plan that rests on it, and can be replaced. Nothing here but ``trace`` imports torch.
"""
