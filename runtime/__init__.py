"""What serves the machine and its user: it takes plain values and imports nothing of the method.

    cli, messages, progress      command lines, sentences for mistakes, one line of progress
    sources                      tiny, a path or a Hub id -> local files
    rows, weights, config_json   files -> rows, tensors, a model's settings; what is refused in them
    sae_ids                      names of the published SAEs on the Hub and on Neuronpedia
    device, ranks                device and dtype; one process or many
    folder, checkpoint           the folder of a run, and its resumption
    output, tables               files written whole or not at all; csv, json and intervals
    outcome, colours             what a run's log says, in a table, in words and in a picture

To understand the method you can skip this folder.
"""
