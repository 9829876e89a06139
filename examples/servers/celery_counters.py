"""Counters that all processes of a Celery worker share; none is lost, though processes come and go.

strictflow-mp serve counters &
mkdir -p queue && celery --app celery_counters worker --concurrency 4 --max-tasks-per-child 50
python celery_counters.py                # sends 100 words, and prints the counters when all are counted
"""

from celery import Celery

from strictflow_mp import StrictFlow, write

app = Celery("celery_counters", broker="filesystem://")
app.conf.broker_transport_options = {"data_folder_in": "queue", "data_folder_out": "queue"}
flow = StrictFlow("counters")


@write(flow)
def add(word):
    words = flow.state.setdefault("words", {})
    words[word] = words.get(word, 0) + 1


@app.task(ignore_result=True)
def count(word):
    add(word)  # no need to wait: every later read sees it, and it survives this process


if __name__ == "__main__":
    with flow.watch("words") as changes:
        before = sum(flow.state.get("words", {}).values())
        for word in ["red", "green", "blue", "red"] * 25:
            count.delay(word)
        for change in changes:
            if sum(change.value.values()) >= before + 100:
                print(change.value)
                break
