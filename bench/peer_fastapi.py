"""A plain embedding server as many teams write it: sentence-transformers behind FastAPI.

    peer_fastapi.py MODEL PORT DTYPE

Runs in the environment that `make serve-peers` creates, and imports nothing of this project. Requests are answered as
OpenAI's API does, on FastAPI's own pool of threads; texts are used as they come, without a prompt.
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": sys.argv[3]})
app = FastAPI()


class Request(BaseModel):
    """What is read of a request."""

    input: list[str]


@app.get("/health")
def health() -> dict[str, bool]:
    """Say that the model is loaded."""
    return {"ready": True}


@app.post("/v1/embeddings")
def embed(request: Request) -> dict[str, Any]:
    """Embed texts."""
    vectors = model.encode(request.input, normalize_embeddings=True, show_progress_bar=False)
    return {"data": [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
