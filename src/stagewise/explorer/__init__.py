"""The page to look around in: the results of a run as a store that a browser reads piece by piece, and the page itself.

store.py      arrays and documents in one Zarr folder, in the order in which a browser asks for them
contents.py   what of the results goes there, and under which name
page.py       the page: one file, with as much of the store baked in as is wanted
serve.py      a server on the loopback interface

The page is written in TypeScript, in ``explorer/`` of the repository; ``bundle/`` is what was built of it. This room
may read results; it computes nothing that a report does not say.
"""
