def collect(results):
    return {"threshold": results["threshold"]}


def draw(outcome, figure):
    figure.subplots()
