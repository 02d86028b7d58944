"""GPTCache's side of the comparison. Runs in a Python that has it, and imports nothing of this project.

    PYTHON gptcache_side.py FILE.npz DIR

The file holds `vectors` (float32, rows of length 1), and as numbers of its rows what is `stored` and what is `asked`. Set up
as GPTCache's README does it ("Similar search cache"): SQLite and FAISS, SearchDistanceEvaluation, all else as it comes; but
the embedding function is ours, which looks the vectors up, and it may hold all that is stored, not 1,000. Each stored
question's answer is its own number. Prints one line of JSON: for each question asked the number that was answered or null,
and how long storing and asking took.
"""

# mypy: disable-error-code="import-not-found"

import json
import sys
import time

import numpy as np
from gptcache import Cache
from gptcache.adapter.api import get, put
from gptcache.manager import CacheBase, VectorBase, get_data_manager
from gptcache.processor.pre import get_prompt
from gptcache.similarity_evaluation.distance import SearchDistanceEvaluation


def main() -> None:
    given = np.load(sys.argv[1])
    vectors = given["vectors"]
    where = sys.argv[2]
    cache = Cache()
    cache.init(
        pre_embedding_func=get_prompt,
        embedding_func=lambda prompt, **_: vectors[int(prompt)],
        data_manager=get_data_manager(
            CacheBase("sqlite", sql_url=f"sqlite:///{where}/gptcache.db"),
            VectorBase("faiss", dimension=vectors.shape[1], index_path=f"{where}/faiss.index"),
            max_size=len(given["stored"]) + 1,
        ),
        similarity_evaluation=SearchDistanceEvaluation(),
    )
    began = time.perf_counter()
    for row in given["stored"]:
        put(str(row), str(row), cache_obj=cache)
    stored_s = time.perf_counter() - began
    answers, times_s = [], []
    for row in given["asked"]:
        began = time.perf_counter()
        answer = get(str(row), cache_obj=cache)
        times_s.append(time.perf_counter() - began)
        answers.append(None if answer is None else int(answer))
    threshold = cache.config.similarity_threshold
    print(json.dumps({"answers": answers, "stored_s": stored_s, "times_s": times_s, "threshold": threshold}))


if __name__ == "__main__":
    main()
