"""Limits that all uvicorn workers obey at once, and a counter that they share.

strictflow-mp serve limits &
uvicorn --workers 4 fastapi_limits:app
curl -X PUT 'localhost:8000/limit/10'    # when this has answered, no worker obeys an older limit
curl -X POST localhost:8000/orders       # counted exactly, by whichever worker
"""

import asyncio
import os
from contextlib import asynccontextmanager

from fastapi import FastAPI

from strictflow_mp import StrictFlow, write

flow = StrictFlow("limits")
local = {"limit": None}  # this worker's own copy, for what must be told rather than ask


@write(flow)
def order():
    count, limit = flow.state.get("orders", 0), flow.state.get("limit", 100)
    if count < limit:  # nobody else changes anything meanwhile
        flow.state["orders"] = count + 1
    return count < limit


async def follow(changes):
    async for change in changes:
        local["limit"] = change.value


@asynccontextmanager
async def lifespan(app):
    with await asyncio.to_thread(flow.watch, "limit") as changes:  # in a thread: it may have to wait for the flow
        local["limit"] = flow.peek("limit", None)
        task = asyncio.create_task(follow(changes))
        yield
        task.cancel()


app = FastAPI(lifespan=lifespan)


@app.put("/limit/{limit}")
async def set_limit(limit: int):
    await flow.put("limit", limit)
    return {"pid": os.getpid()}


@app.get("/health")
async def health():
    return {"pid": os.getpid()}


@app.get("/")
async def show():
    async with flow.snapshot() as state:  # never blocks the event loop
        return {**state, "told": local["limit"], "pid": os.getpid()}


@app.post("/orders")
async def make_order():
    return {"accepted": await order(), "pid": os.getpid()}
