"""The OpenAI-compatible HTTP surface. Needs starlette and uvicorn; imported only where it is on."""
