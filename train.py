"""The synchronous loop: generate with the newest weights, train on what was generated, hand the weights back.

python train.py --hf-checkpoint DIR --prompt-data FILE --rm-type math ...      (python train.py --help)
"""

import sys

from miles.cluster import App, run


def train(app: App) -> None:
    app.publish_weights(app.start)
    app.evaluate_if_due(app.start)
    app.finish_step(app.start)
    for rollout_id in app.rollouts():
        step = rollout_id + 1
        batch = app.generate(rollout_id)
        app.train(rollout_id, batch)
        app.publish_weights(step)
        app.evaluate_if_due(step)
        app.finish_step(step)
        app.save_if_due(step)


if __name__ == "__main__":
    sys.exit(run(train))
