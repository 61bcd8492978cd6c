"""``oar serve MODEL``: draw and edit in a browser, or by HTTP (the extra ``serve``: FastAPI on uvicorn).

    guard           who may ask: host, origin, token, size
    page_api        GET /  /static/...  /api/model,  POST /api/jobs,  GET /api/jobs/ID/events,  DELETE /api/jobs/ID,  GET /api/images/ID.png
    openai_api      /v1/models,  /v1/images/generations,  /v1/images/edits
    service         what they share: jobs, results, the queue's bounds (limits), metrics
    worker          the one thread that the model runs in, around one ContinuousBatch
    server          the model, jobs that end before it stops; listening: the port, connections, signals

A request becomes a ``Task`` (tasks, uploads), a task a ``Job`` (jobs) in the queue. The worker begins it when there is a slot, and sends
what happens to the event loop, where requests are served. Uploads are decoded and PNGs written in other threads (uploads, pictures).

``GET /api/model``
    {name, prompt_kind: captions | classes | features, classes: number of classes or null, image_size, grid, orders: [policies],
    edits: whether the model can edit, defaults: {guidance, temperature, top_k, top_p, order, steps},
    limits: {prompt_characters, images_per_request, upload_bytes, pixels}}

``POST /api/jobs``
    {kind: sample | edit, prompt, count, seed, order, guidance, temperature, top_k, top_p, steps, image, mask, strength} -> 202
    {id, position}. All but the prompt may be left out; null is the default. Also guidance_schedule, guidance_start, min_p,
    score, order_temperature, feather. A field that there is not is refused. ``prompt`` is a text; of a model of classes a number or its
    digits; of one of features a list of rows. ``image`` and ``mask`` are data URLs (PNG, JPEG, WebP); of the mask white is drawn; without
    a mask the fully transparent pixels of the image are, or all of it where strength is below 1.

``GET /api/jobs/ID/events``, server-sent events; each has an id, and ``Last-Event-ID`` goes on behind it
    queued {position: jobs before it}    start {cells: of an image, known: [[cells of each image]]}
    step {image, cells, scores, placed, total}    preview {image, url: data URL of the square so far, transparent where it is empty}
    done {images: [{url, seed, number, order, scores, drawn}]}: order and scores of all cells as they were placed, known ones first (score
    0); drawn: the others    error {message, type, param, code}; code: cancelled, timeout, server_stopped
    The stream ends after done or error. Superseded places in the queue and previews are left out when events are read again.
    A job whose events nobody reads for 15 s is stopped.

Errors, on every path: {error: {message, type, param, code}}; 429 has Retry-After.

A token goes into ``Authorization: Bearer``; ``/``, ``/static/`` and ``/healthz`` need none.
"""
