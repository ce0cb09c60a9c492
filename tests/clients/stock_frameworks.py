"""LangChain's and LlamaIndex's OpenAI embedding classes on /v1; prints what they got as JSON. Arguments: URL KEY."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any
from unittest import mock

import openai
import tiktoken
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding

TEXTS = ["Where is the library?", "图书馆在哪里？", "a third one"]
# Their vocabularies are fetched from the network; what counts here is that the ids are of another tokenizer.
BYTES = tiktoken.Encoding("bytes", pat_str=r".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})


def main(url: str, key: str) -> dict[str, Any]:
    """Use both."""
    chain = OpenAIEmbeddings(model="mini", base_url=url, api_key=key, check_embedding_ctx_length=False)
    short = OpenAIEmbeddings(model="mini", base_url=url, api_key=key, check_embedding_ctx_length=False, dimensions=64)
    by_ids = OpenAIEmbeddings(model="mini", base_url=url, api_key=key, max_retries=0)
    index = OpenAIEmbedding(model_name="mini", api_base=url, api_key=key)
    refused = ""
    with mock.patch.object(tiktoken, "encoding_for_model", return_value=BYTES):
        try:
            by_ids.embed_documents(TEXTS)
        except openai.BadRequestError as error:
            refused = error.message
    return {
        "langchain": chain.embed_documents(TEXTS),
        "langchain_query": chain.embed_query(TEXTS[0]),
        "langchain_async": asyncio.run(chain.aembed_documents(TEXTS)),
        "langchain_dimensions": short.embed_documents(TEXTS),
        "langchain_by_ids": refused,
        "llama_index": index.get_text_embedding_batch(TEXTS),
        "llama_index_query": index.get_query_embedding(TEXTS[0]),
        "llama_index_async": asyncio.run(index.aget_text_embedding_batch(TEXTS)),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
