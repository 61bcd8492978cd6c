"""``oar plan``: memory, time, cost and goodput of a recipe on a cluster, before a GPU is used.

    shape              the recipe's model without its tokenizers: its spec, its parameters, its number of images
    activations        memory that the forward pass keeps for the backward pass, by formula
    trace              the same, by running the model on fake tensors
    worker_memory      everything that a training worker holds, for each ZeRO stage
    memory_fit         whether the recipe fits, and the nearest settings that do
    step_time          the time of a step: operations, bytes between workers, bytes from storage
    traffic            bytes and requests that shards, checkpoints and orders cost the storage
    failures           checkpoint interval, and the share of the time that is useful training (goodput), simulated
    training_stage     a training stage as a whole: time, checkpoints, failures, money
    tokens_plan        codes of all images
    extraction_plan    orders for all images (actors, time, makespan)
    evaluation_plan    the evaluation, and 50,000 samples of a model
    stream_load        which ranks read which shards, by the real sample plan
    alternatives       the same run with other settings that cost less
    simulation         ``--simulate``: stream and extraction simulated at a given size
    plan, plan_report  all of it together; as text and as JSON

Assumptions (peaks, links, prices, rates of failure) are in ``assumptions.yaml`` with their source and date, are printed with every plan
that uses them, and can be replaced. Nothing here but ``trace`` imports torch.
"""
