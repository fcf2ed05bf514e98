"""An HTTP server for one model: limits, uploads, a queue with one worker, routes, and the page of an image drop.

Needs the extra serve (FastAPI, uvicorn). Nothing that a client sends is written to disk.
"""
