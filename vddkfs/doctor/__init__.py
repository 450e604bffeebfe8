"""What can work on this machine, and what cannot: the checks of ``vddkfs doctor``.

Each group (``machine``, ``library``, ``transports``, ``server``, ``sources``) looks first, and then
judges what it saw in functions that touch nothing. ``examination`` puts them together. Every look
is bounded in time, and none can end the command: see ``rows.bounded``. The library is never loaded
here: a worker does that, or a process of ``probe`` for each question.
"""
