"""``oar study``: which of two pictures do people prefer? Blind pairs, shown in a browser (the extra ``study``).

    build           folders of drawings (arms) become a study: comparisons, pictures without names (study)
    server, app     oar study serve: the page, and what it speaks
    sessions        who is shown what next, and what was answered; answers: the SQLite file
    results         oar study results: preference with its uncertainty (intervals, bradley_terry, agreement)

Not to be confused with ``oar_scale.studies``, which compares methods of extraction without asking anybody.
"""
