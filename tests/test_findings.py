"""Every finding in words: its text, with # for what is measured, of a program that shows it."""

import re
import warnings

import faulty
import pytest
import torch

from benchmarks.faults.__main__ import PROGRAMS
from benchmarks.faults.judging import by_epochal
from benchmarks.faults.program import Program
from epochal.doctor import finding

# Of each code: a program of the benchmark, or of tests/faulty.py, and what is told.
EXPECTED = {
    "too-few-epochs": (
        "digits_stopped_by_a_large_delta",
        """\
info too-few-epochs: the run ended while the model was still improving.
  measured: the loss fell by #% an evaluation at the end (# % is still learning)
  where:    the last of # evaluations
  why:      The run ended while the model was still learning: what it could do is not known.
  fix:      give more epochs, or a larger patience; resume=True goes on with a run that was saved""",
    ),
    "overfitting": (
        "a_simulation_that_is_the_same_in_all_workers",
        """\
info overfitting: the model is overfitting since epoch #
  measured: val_loss rises while train_loss falls; train_r# # val_r# #: a gap of #
  where:    epoch # on
  why:      The model learns its data by heart: what it gains on train, it loses on all that is new.
  fix:      give patience=# more data, augmentation, dropout or weight_decay=# or a smaller model""",
    ),
    "exploding-gradient": (
        "means_through_a_recurrence_that_grows",
        """\
error exploding-gradient: the gradient explodes on its way back through the sequence.
  measured: by the first of # places it is # times that by the last (# allowed)
  where:    Doubling; judging.py:#
  why:      A gradient that grows on the way back through a sequence, or through the layers, makes every rate too high.
  fix:      give clip=# initialise recurrent weights with nn.init.orthogonal_, or take nn.LSTM""",
    ),
    "vanishing-gradient": (
        "openings_that_fade_away",
        """\
warning vanishing-gradient: the gradient vanishes on its way back through the sequence.
  measured: by the first of # places it is # of that by the last (# allowed)
  where:    Remembering; judging.py:#
  why:      What comes early in a sequence has no influence on the loss where the gradient fades on the way back to it.
  fix:      take nn.LSTM or nn.GRU, initialise recurrent weights with nn.init.orthogonal_, or use attention""",
    ),
    "saturation": (
        "table_with_sigmoids_at_their_ends",
        """\
warning saturation: most units of a layer are at the ends of their activation.
  measured: #% of what (sigmoid) gives is within # of its ends (# % allowed), in # batches
  where:    (sigmoid) of Squashed
  why:      A sigmoid or a tanh at its ends is flat: nothing goes back through it, and the units before it stand still.
  fix:      normalise what goes into it, initialise smaller, nn.init.xavier_normal_, or take nn.ReLU()""",
    ),
    "tiny-batch-norm": (
        "images_normalised_in_pairs",
        """\
warning tiny-batch-norm: batch norm is trained on very small batches.
  measured: # samples in a batch (# at least), # numbers of each channel
  where:    # (BatchNorm#d)
  why:      Batch norm estimates mean and deviation from the batch; of two or three numbers they are noise.
  fix:      give batch_size=# or more, or take nn.GroupNorm, which does not look at the batch""",
    ),
    "penalty-dominates": (
        "digits_with_a_penalty_on_all_weights",
        """\
warning penalty-dominates: the penalty on the weights is stronger than the error itself.
  measured: its gradient is # times that of the error (# allowed)
  where:    judging.py:#
  why:      The penalty is larger than the error: the weights shrink towards # instead of learning.
  fix:      make it smaller: weight_decay=# with adamw, or a factor of # in the objective""",
    ),
    "stuck-at-chance": (
        "slopes_in_a_bag",
        """\
warning stuck-at-chance: the model learns nothing of what the inputs tell.
  measured: of # rows held out, neighbours or a linear model explain #% of the targets (#% is chance), and a copy trained for # updates nothing
  where:    Sequential; judging.py:#
  why:      The inputs tell the labels, and the model does not learn it: it cannot see what they depend on.
  fix:      give the model what the answer depends on: order and positions, all of the inputs, more width""",
    ),
    "labels-unrelated": (
        "two_loaders_that_shuffle",
        """\
warning labels-unrelated: the labels seem to have nothing to do with the inputs.
  measured: of # rows held out, neighbours and a linear model explain #% (#% is chance), and a trained copy no more
  where:    train; judging.py:#
  why:      Labels that belong to other samples can be learned by heart, and never predicted.
  fix:      look at how inputs and labels are put side by side: look at some pairs, and shuffle both by the same index""",
    ),
    "zero-gradient": (
        "openings_scored_by_the_first_state",
        """\
info zero-gradient: the gradient of some weights is exactly #
  measured: # of # matrices in all # looks
  where:    scores.weight
  why:      A gradient of exactly # moves nothing: something on the way has no slope (a sign, a clamp, a dead unit, a factor of #).
  fix:      look for torch.sign, round, clamp, a comparison, or a factor of # after these layers""",
    ),
    "dead-units": (
        "images_scaled_by_the_loader_and_by_the_model",
        """\
info dead-units: most units of a layer are dead: they get no gradient.
  measured: #% of body.#weight (# % allowed), in three looks
  where:    body.#weight
  why:      A unit behind a ReLU that is never above # gets no gradient, and does not come back.
  fix:      lower lr, initialise with nn.init.kaiming_normal_ and biases of # or take nn.LeakyReLU()""",
    ),
    "divergence": (
        "table_with_a_momentum_of_one",
        """\
error divergence: the momentum never slows down, and the weights will diverge.
  measured: # (below #)
  where:    SGD, judging.py:#
  why:      A momentum of # never slows down: the weights swing wider and wider.
  fix:      give momentum=#""",
    ),
    "lr-too-low": (
        "digits_with_a_rate_for_tuning",
        """\
warning lr-too-low: the learning rate is too low for this model.
  measured: an update changes the weights by # of themselves, and all # by less than # %, in three looks; the loss went from # to #
  where:    judging.py:#
  why:      Updates that change the weights by next to nothing will not get anywhere in the time that is planned.
  fix:      give lr=#""",
    ),
    "lr-too-high": (
        "images_with_a_rate_of_one",
        """\
warning lr-too-high: the learning rate is too high for this model.
  measured: the loss went from # to # at lr # and to # at # (a fifth less is enough to tell)
  where:    judging.py:#
  why:      Updates that change the weights by a large part of themselves throw away what was learned.
  fix:      give lr=#""",
    ),
    "clipping": (
        "digits_with_scaled_gradients_clipped",
        """\
warning clipping: gradients are always cut down to a small part of themselves.
  measured: the gradient arrives # times as large as that which the optimizer steps with (# allowed), in # looks
  where:    judging.py:#
  why:      A gradient that is always cut down to a small part of itself is that of a rate so much lower.
  fix:      give clip=# or none; with a loss scale, call scaler.unscale_(optimizer) before clip_grad_norm_""",
    ),
    "loss-metric-disagree": (
        "the_best_place_instead_of_the_best_word",
        """\
warning loss-metric-disagree: a metric takes the argmax over another dimension than the classes.
  measured: argmax over dimension # of (# # #); the loss has its classes in dimension #
  where:    loss_faults.py:#
  why:      A metric that is computed over another dimension than the loss says nothing of what is learned.
  fix:      take outputs.argmax(#)""",
    ),
    "impossible-metric": (
        "impossible_metric",
        """\
error impossible-metric: accuracy is # which no share can be.
  measured: # over val (# to # allowed)
  where:    metrics=, accuracy
  why:      A share above # or below # is none: the metric counts something twice, or divides by the wrong number.
  fix:      divide by the number of samples, and look at the shapes: (n,) == (n, #) compares each with each""",
    ),
    "wrong-average": (
        "wrong_average",
        """\
warning wrong-average: the metric 'rmse' is averaged over batches, and is no mean.
  measured: # averaged over the batches of val, # over all of it (# % allowed)
  where:    metrics=, rmse
  why:      A metric that is no mean over samples (a root, an f# a correlation) is another one when it is averaged over batches.
  fix:      give epochal.Metric or a torchmetrics metric, which keeps what it needs of each batch""",
    ),
    "logit-threshold": (
        "the_argmax_of_a_single_logit",
        """\
warning logit-threshold: an argmax is taken over a single column, and is always #
  measured: argmax over dimension # of (# #)
  where:    loss_faults.py:#
  why:      A threshold of # or rounding, is for probabilities; of scores, # is the middle. An argmax over one column is #
  fix:      compare the score with #: (outputs > #)""",
    ),
    "inputs-ignored": (
        "openings_scored_by_the_first_state",
        """\
warning inputs-ignored: the outputs are the same for all inputs.
  measured: after # updates those of # samples differ by # of their size (# at least)
  where:    scores (Linear); judging.py:#
  why:      A model whose output is the same for all samples has learned the mean of the targets, and nothing of the inputs.
  fix:      look in the forward at what becomes of x: an unused variable, a layer that was not called, a unit that is dead""",
    ),
    "causal-leak": (
        "words_read_from_both_ends",
        """\
error causal-leak: the model sees what it is to predict.
  measured: with the last of # places changed, outputs of earlier ones move by # of their size (# allowed)
  where:    BothWays; judging.py:#
  why:      A model that predicts what comes next, and can see it, copies it: its loss falls to # and it can predict nothing.
  fix:      give the attention a causal mask, nn.Transformer.generate_square_subsequent_mask(T); pad a convolution on the left""",
    ),
    "batch-mixing": (
        "progression_normalised_by_its_batch",
        """\
warning batch-mixing: the output for a sample depends on the other samples of its batch.
  measured: with sample # changed, those of others move by # of their size (# allowed), in eval mode
  where:    Scaled; judging.py:#
  why:      The output for one sample must not depend on the others in its batch: when they are gone, it is another one.
  fix:      look at every view, reshape and transpose: dimension # stays the batch; nn.LSTM(..., batch_first=True)""",
    ),
    "stochastic-eval": (
        "digits_with_a_train_that_forgets_its_mode",
        """\
warning stochastic-eval: the model gives different outputs for the same inputs in eval mode.
  measured: two calls differ by # of their size (# allowed)
  where:    Dropping; judging.py:#
  why:      A model that draws in eval mode gives other predictions each time, and early stopping follows the noise.
  fix:      give F.dropout(x, p, training=self.training), and draw nothing when not self.training""",
    ),
    "eval-in-train-mode": (
        "digits_with_a_train_that_forgets_its_mode",
        """\
error eval-in-train-mode: layers stay in train mode when the model is evaluated.
  measured: # of the layers whose mode matters, after model.eval()
  where:    body.# (BatchNorm#d) and so on
  why:      In train mode dropout draws and batch norm looks at the batch: what is validated is not the model that is used.
  fix:      leave train() and eval() to nn.Module: def train(self, mode=True): super().train(mode); return self""",
    ),
    "symmetric-init": (
        "digits_with_one_number_in_all_weights",
        """\
error symmetric-init: all units of a layer begin with the same weights, and get the same gradient.
  measured: # equal rows with equal gradients; all its weights are #
  where:    #weight
  why:      Units that begin alike and get the same gradient stay alike for ever: the layer has one unit, however many are paid for.
  fix:      leave the weights to torch's initialisation, or nn.init.kaiming_normal_(layer.weight)""",
    ),
    "lost-updates": (
        "words_with_adam_in_bf16",
        """\
warning lost-updates: updates are rounded away: the weights are in half precision.
  measured: #% of the numbers have a gradient and did not change (half allowed)
  where:    words.weight, reader.weight_ih_l# reader.weight_hh_l# reader.bias_ih_l# and # more
  why:      A weight in bf# has # bits: an update that is smaller than a #th of it is rounded away, and it never moves.
  fix:      keep the weights in fp# model.float(), and give precision="bf#", which computes in bf#""",
    ),
    "unscaled-accumulation": (
        "images_with_a_sum_of_micro_batches",
        """\
error unscaled-accumulation: the gradients of micro-batches are added up, and not averaged.
  measured: the factors of # backward passes make # (# is the mean)
  where:    step=, update #
  why:      Gradients of micro-batches add up: without a division their sum is that of a rate so many times as high.
  fix:      divide: (loss / len(window.batches)).backward(), or by samples, size / window.samples""",
    ),
    "gradient-ascent": (
        "a_similarity_that_is_minimised",
        """\
error gradient-ascent: the likeness to the targets is minimised, not maximised.
  measured: the derivative by the cosine similarity is # above #
  where:    loss_faults.py:#
  why:      What is minimised falls where the error rises: every update makes the model worse.
  fix:      minimise # - cosine_similarity(outputs, targets)""",
    ),
    "schedule-before-step": (
        "schedule_before_step",
        """\
error schedule-before-step: the schedule is stepped before the optimizer.
  measured: it had moved before the first step of the optimizer, in update #
  where:    step=, in this order: backward, early schedule, step
  why:      A schedule that moves before the optimizer has stepped skips its first rate.
  fix:      call scheduler.step() after optimizer.step(), or give schedule= and leave it to epochal""",
    ),
    "foreign-parameters": (
        "table_with_the_optimizer_of_a_copy",
        """\
error foreign-parameters: the optimizer holds parameters that are not the model's, and lacks some that are.
  measured: # of its # parameters are of another model; # of this one's are not in it
  where:    not in it: #weight, #bias, #weight, #bias and # more; judging.py:#
  why:      The optimizer moves tensors that the model does not compute with: the model was copied or rebuilt after it was made.
  fix:      make the optimizer after the last change of the model, over model.parameters()""",
    ),
    "step-without-effect": (
        "step_without_effect",
        """\
error step-without-effect: the optimizer steps when no parameter has a gradient.
  measured: no weight moved in update #
  where:    step=, in this order: backward, empty step, step
  why:      An update that moves no weight trains nothing, however long it runs.
  fix:      call them in this order: zero_grad(), loss.backward(), optimizer.step()""",
    ),
    "missing-zero-grad": (
        "missing_zero_grad",
        """\
error missing-zero-grad: the gradients of the last update are still in those of this one.
  measured: the optimizer stepped with them in update # and they were not cleared since
  where:    step=, in this order: backward, stale step, step
  why:      Gradients add up: without zero_grad() every update follows the sum of all gradients since the start.
  fix:      call optimizer.zero_grad() before loss.backward()""",
    ),
    "random-validation": (
        "noise_on_the_images_of_the_validation",
        """\
warning random-validation: a sample of val is another one each time it is fetched.
  measured: sample # fetched twice, differs
  where:    val, Subset; judging.py:#
  why:      A sample of val that is another one each time makes two evaluations differ, and augmented ones are not the task.
  fix:      augment train only: give val a data set without random transforms""",
    ),
    "worker-randomness": (
        "a_simulation_that_is_the_same_in_all_workers",
        """\
warning worker-randomness: the workers have copies of one generator, and draw the same random numbers.
  measured: # workers, and a generator of the data set's own
  where:    Simulated.draw; judging.py:#
  why:      Every worker has a copy of the data set: a stream that is not divided comes once from each, and a generator of its own gives all of them the same random numbers.
  fix:      draw from torch's own generator (torch.rand), which each worker seeds differently, or seed it in worker_init_fn""",
    ),
    "same-order": (
        "same_order",
        """\
warning same-order: the data come in the same shuffled order in each epoch.
  measured: the first # indices of two epochs are the same
  where:    Fixed; judging.py:#
  why:      Data in the same order in each epoch are the same batches again and again: their noise no longer cancels out.
  fix:      draw from one generator that is made once, or from (seed, epoch) with set_epoch(epoch)""",
    ),
    "unshuffled": (
        "digits_class_by_class",
        """\
warning unshuffled: the data are sorted by their targets, and are not shuffled.
  measured: a batch has #% of the entropy of the labels that the data have (# % at least), over # batches
  where:    train; judging.py:#
  why:      Sorted data in their order give batches of one class: the model learns them in turns, and forgets.
  fix:      give shuffle=True, or a DataLoader with shuffle=True""",
    ),
    "nonfinite-targets": (
        "nonfinite_targets",
        """\
error nonfinite-targets: the targets hold a value that is not finite; the weights were not touched.
  where:    step # epoch # batch #; row # of it; loss nan, gradient norm nan, lr #
  why:      A NaN or an infinity among the targets makes the loss of its batch NaN, and the weights with it.
  fix:      mend or leave out these rows, or use nonfinite="skip"""",
    ),
    "nonfinite-inputs": (
        "logarithm_of_measurements_that_can_be_zero",
        """\
error nonfinite-inputs: the inputs hold a value that is not finite; the weights were not touched.
  where:    step # epoch # batch #; row # of it; loss nan, gradient norm nan, lr #
  why:      A NaN or an infinity in the inputs makes the loss of its batch NaN, and the weights with it.
  fix:      mend or leave out these rows, or use nonfinite="skip"""",
    ),
    "small-val": (
        "eight_images_to_judge_by",
        """\
info small-val: the validation is made on very few samples.
  measured: # (# at least)
  where:    val; judging.py:#
  why:      What is measured on a handful of samples is mostly chance, and so is what is chosen by it.
  fix:      give val=# or divide the data several times and take the mean""",
    ),
    "conflicting-labels": (
        "two_people_who_labelled_it",
        """\
info conflicting-labels: the same inputs have different labels.
  measured: #% of # samples have a twin of another class (# % allowed)
  where:    train; judging.py:#
  why:      The same inputs with different labels cannot both be learned; somebody has labelled them twice.
  fix:      keep one label for each, by a vote say""",
    ),
    "duplicates-in-val": (
        "two_subsets_that_overlap",
        """\
warning duplicates-in-val: samples of val are in train, too.
  measured: #% of # have the same inputs as a sample of train (# % allowed)
  where:    val; judging.py:#
  why:      Samples of val that are in train, too, make the validation too good: it asks what was already told.
  fix:      divide after duplicates are taken out, and before anything is copied or augmented""",
    ),
    "image-layout": (
        "a_reshape_where_axes_are_to_be_swapped",
        """\
warning image-layout: the pixels of the images lie in another order than that of their shape.
  measured: neighbours differ by # of what any two do, and by # where the channels are read as the last dimension (a third less is enough to tell)
  where:    what # gets, (# # # #)
  why:      A reshape does not exchange dimensions: it deals the pixels of an image out to others.
  fix:      exchange dimensions with X.permute(# # # #), not with reshape or view""",
    ),
    "constant-feature": (
        "gaps_filled_over_the_whole_column",
        """\
info constant-feature: some features have one value only.
  measured: # of # columns, over # rows
  where:    columns # of the inputs
  why:      A feature that never changes tells nothing; a column may have been lost when the data were made.
  fix:      look at how they are made, or leave them out""",
    ),
    "normalised-twice": (
        "images_scaled_by_the_loader_and_by_the_model",
        """\
warning normalised-twice: the inputs are nearly #: they may have been scaled twice.
  measured: root mean square # (# at least), largest #
  where:    what body.# gets; judging.py:#
  why:      Inputs close to # leave nothing but the biases to learn from; they were probably scaled twice.
  fix:      scale them once, in the data or in the model: (X - X_train.mean(#)) / X_train.std(#)""",
    ),
    "unnormalised-inputs": (
        "bytes_of_images_as_floats",
        """\
warning unnormalised-inputs: the inputs are not normalised.
  measured: root mean square # (# allowed), largest #
  where:    what # gets; judging.py:#
  why:      Layers are initialised for inputs of about # in size: large ones saturate them, uneven ones hide each other.
  fix:      give X / # for bytes of images, or (X - X_train.mean(#)) / X_train.std(#), for val too""",
    ),
    "warmup-order": (
        "images_that_warm_up_at_the_end",
        """\
warning warmup-order: the warm-up does not lead to the full rate.
  measured: update #: #; update #: #; update #: #; the highest is # (# times from one to the next allowed, and no warm-up after the peak)
  where:    SequentialLR; judging.py:#
  why:      A warm-up begins low and rises; one that comes too late, or jumps, hits the weights with the full rate at once.
  fix:      give epochal.Schedule("cosine", warmup=#): it warms up first, and reaches the full rate""",
    ),
    "schedule-horizon": (
        "digits_with_a_cycle_of_another_run",
        """\
warning schedule-horizon: the schedule is made for another length, or moves in another unit.
  measured: the rate rises to # in # updates, and its peak would be #
  where:    OneCycleLR, moved each step; judging.py:#
  why:      A schedule that is made for another length, or moved in another unit, ends too early or never gets anywhere.
  fix:      give epochal.Schedule(..., per="epoch"), or its length in steps: #; a name, schedule="cosine", takes the plan's""",
    ),
    "decayed-norms": (
        "decayed_norms",
        """\
info decayed-norms: weight decay is applied to the scales of norms.
  measured: weight_decay # (# at least) for # parameters
  where:    #weight, #bias
  why:      Weight decay pulls the scales of norms, and biases, towards # where they do not belong.
  fix:      make two groups: p.dim() > # with the decay, all others with weight_decay=#""",
    ),
    "odd-betas": (
        "words_with_betas_in_the_wrong_order",
        """\
warning odd-betas: settings of the optimizer are not those of an Adam that works.
  measured: betas are (# #): the second has to be the higher one
  where:    Adam, judging.py:#
  why:      Adam divides by a running mean of squares: it has to be slower than the mean it divides, and never #
  fix:      give betas=(# #)""",
    ),
    "absurd-lr": (
        "images_with_a_rate_rounded_away",
        """\
error absurd-lr: the learning rate is #: nothing is trained.
  measured: lr # (above #) of SGD
  where:    judging.py:#
  why:      The learning rate cannot be meant: at # nothing moves, and an Adam moves every weight by it in each update.
  fix:      give lr=# for the family of Adam, # to # for SGD""",
    ),
    "init-scale": (
        "init_scale",
        """\
info init-scale: the layers blow their inputs up.
  measured: a deviation of # in # of # in #: # times (# allowed)
  where:    # to #
  why:      Where layers blow their inputs up, or let them fade, the first updates go into mending that.
  fix:      initialise with nn.init.kaiming_normal_(layer.weight), or put norms between the layers""",
    ),
    "train-in-eval-mode": (
        "images_looked_at_between_two_steps",
        """\
warning train-in-eval-mode: layers are in eval mode while they are trained.
  measured: # of the layers whose mode matters
  where:    # (BatchNorm#d), # (Dropout), # (BatchNorm#d), # (Dropout)
  why:      In eval mode dropout does nothing and batch norm keeps its old statistics: what is trained is another model.
  fix:      call model.train() before the update, and .eval() only for what is frozen; do not set modes in the forward""",
    ),
    "batch-norm-of-one": (
        "batch_norm_of_one",
        """\
error batch-norm-of-one: the last batch of each epoch has one sample, on which batch norm cannot be trained.
  measured: # samples in batches of # leave #
  where:    # (BatchNorm#d), judging.py:#
  why:      Batch norm divides by the deviation over the batch, and one sample has none: the last batch of an epoch ends the run.
  fix:      give another batch_size, or a DataLoader with drop_last=True""",
    ),
    "dropout": (
        "digits_with_the_share_to_keep",
        """\
warning dropout: dropout sets most of its inputs to #
  measured: p = # (# is usual)
  where:    # (Dropout)
  why:      A dropout that drops everything, or nothing, or nearly everything, is not what was meant.
  fix:      give p=# to #: it is the share that is set to #""",
    ),
    "missing-nonlinearity": (
        "missing_nonlinearity",
        """\
warning missing-nonlinearity: linear layers follow one another with no activation between them.
  measured: # of the # linear layers get the unchanged output of another one
  where:    # -> # # -> #
  why:      Two linear layers in a row are one linear layer: the second adds parameters, and nothing that can be learned.
  fix:      put an activation between them, nn.ReLU() say""",
    ),
    "too-few-outputs": (
        "a_vocabulary_one_word_short",
        """\
error too-few-outputs: a target is outside the # classes that the model gives scores for.
  measured: target # (# to # allowed)
  where:    position #; loss_faults.py:#
  why:      The model has fewer outputs than there are classes.
  fix:      number the classes from # to # or give the model # outputs""",
    ),
    "label-out-of-range": (
        "digits_numbered_from_one_to_ten",
        """\
error label-out-of-range: a target is outside the # classes that the model gives scores for.
  where:    batch # of train; target # at position # of the data, outputs (# #)
  why:      A class index that is not among the model's outputs cannot be learned; on a GPU it ends the process.
  fix:      number the classes from # to #: they seem to start at # give y - #""",
    ),
    "unscaled-targets": (
        "prices_in_full",
        """\
warning unscaled-targets: the targets are far larger than what the model gives.
  measured: their mean is #, their deviation # (# or a tenth of the mean); outputs are # in size
  where:    targets of train; judging.py:#
  why:      Targets far from # or far apart, take thousands of updates until the last layer reaches their size.
  fix:      train on (y - y.mean()) / y.std(), and turn predictions back""",
    ),
    "class-imbalance": (
        "class_imbalance",
        """\
info class-imbalance: some classes are much rarer than others.
  measured: the most frequent is # times as frequent as the rarest (# allowed); always saying it is right for #%
  where:    targets of train; judging.py:#
  why:      Where one class is much more frequent, a model that always says it has a high accuracy.
  fix:      give loss=nn.CrossEntropyLoss(weight=...), or metrics=["f#"], which does not forgive it""",
    ),
    "missing-class": (
        "flowers_cut_by_position",
        """\
warning missing-class: the model has outputs for classes that never occur.
  measured: of # classes # have no label, among #
  where:    class #; judging.py:#
  why:      A class that never occurs is never learned; where it is class # or the last one, the labels are probably off by one.
  fix:      give the model # outputs, or the missing labels""",
    ),
    "targets-ignored": (
        "every_word_masked_out",
        """\
error targets-ignored: all targets of a batch are ignored.
  measured: #% of # equal ignore_index=# (# % allowed)
  where:    judging.py:#
  why:      Targets that equal ignore_index count nothing: where nearly all do, nearly nothing is learned.
  fix:      look at what makes the labels: the padding, the mask, the shift""",
    ),
    "target-format": (
        "several_labels_as_one_distribution",
        """\
error target-format: the targets of cross_entropy are neither class indices nor probabilities.
  measured: the rows of targets (# #) sum to # within # (# allowed), and go from # to #
  where:    judging.py:#
  why:      Classes are given as indices, or as probabilities that sum to #; anything else is not what the loss computes with.
  fix:      give y.argmax(#) if they are scores; loss="bce_with_logits" if several classes hold at once""",
    ),
    "initial-loss": (
        "a_head_drawn_from_the_standard_normal",
        """\
warning initial-loss: at the start cross_entropy is # far above what knowing nothing costs.
  measured: ln(#) = # # times that allowed; the scores spread by # (# allowed)
  where:    # (Head), judging.py:#
  why:      Before it has learned anything, a classifier should lose about ln(classes); far more says that it begins by being sure of what is wrong.
  fix:      normalise the inputs, or initialise the last layer smaller: nn.init.normal_(last.weight, std=#)""",
    ),
    "sum-loss": (
        "sum_loss",
        """\
warning sum-loss: mse is summed over the batch, not averaged.
  measured: reduction='sum' over # entries of # samples, divided by nothing
  where:    faulty.py:#
  why:      The gradient of a sum grows with the batch: a learning rate that suits one batch size does not suit another.
  fix:      divide by the samples: loss / len(targets), or leave reduction at "mean"""",
    ),
    "negative-loss": (
        "negative_loss",
        """\
error negative-loss: cross_entropy is negative, which it never is of what it is made for.
  measured: #; its targets lie from # to #
  where:    faulty.py:#
  why:      A loss that cannot be negative is: what it is given is not what it is made for, and it can fall without end.
  fix:      give targets that are probabilities: from # to # and of classes with the sum #""",
    ),
    "detached-loss": (
        "a_loss_wrapped_in_a_new_tensor",
        """\
error detached-loss: nothing leads back from the loss to a weight: it is cut off from the model.
  measured: of # trained parameters the loss reaches none; the last layer with a graph is the model
  where:    the loss, judging.py:#
  why:      Nothing leads back from the loss to the weights, so no backward pass can change them.
  fix:      return the tensor itself: without .item(), .detach(), .data, torch.tensor(...), argmax or NumPy on the way""",
    ),
    "broadcast-loss": (
        "a_mean_square_over_a_square",
        """\
error broadcast-loss: outputs and targets of different shapes are compared each with each.
  measured: (# #) and (#) made (# #)
  where:    loss_faults.py:#
  why:      Outputs (n,) and targets (n, #) are compared each with each: the loss is that of predicting the mean for all.
  fix:      give both the same shape, for example targets.reshape(outputs.shape)""",
    ),
    "unreachable-targets": (
        "unreachable_targets",
        """\
error unreachable-targets: the model ends with sigmoid, which cannot give these targets.
  measured: #% of the targets are outside of # to # (at most # %): they lie from # to #
  where:    # (Sigmoid), judging.py:#
  why:      The activation at the model's end cannot give these targets: part of the error can never go away.
  fix:      leave out the sigmoid at the end, or scale the targets into its range""",
    ),
    "activation-before-loss": (
        "a_relu_after_every_layer",
        """\
warning activation-before-loss: an activation (ReLU) stands between the last layer and cross_entropy.
  measured: the scores lie from # to # made by ReLU
  where:    the model (Net), judging.py:#
  why:      The scores of a classifier have to be free: an activation before the loss forbids most of them.
  fix:      let the model end with its last nn.Linear""",
    ),
    "bce-on-logits": (
        "a_linear_layer_before_bce",
        """\
error bce-on-logits: nn.BCELoss needs probabilities, but the model gives other numbers.
  where:    batch # of train; model Sequential; the batch is float# (# #)
  why:      BCELoss takes logarithms of its inputs: of what is not a probability they do not exist, or mean nothing.
  fix:      give loss="bce_with_logits", or end the model with a sigmoid""",
    ),
    "sigmoid-before-logits-loss": (
        "a_text_classifier_that_gives_a_probability",
        """\
error sigmoid-before-logits-loss: bce_with_logits gets the output of a sigmoid, and takes the sigmoid once more.
  measured: what it gets lies from # to # made by sigmoid
  where:    the model (Classifier), judging.py:#
  why:      The loss takes the sigmoid itself; of values between # and # it is between # and # and no class # is ever sure.
  fix:      leave the sigmoid out of the model, or give loss="bce"""",
    ),
    "nll-without-log-softmax": (
        "scores_given_to_nll",
        """\
error nll-without-log-softmax: NLLLoss needs logarithms of probabilities, and gets other numbers.
  measured: the highest is # (at most #), and exp of a row sums to # within # (at most #)
  where:    # (Linear), judging.py:#
  why:      NLLLoss only picks numbers out: of anything but logarithms of probabilities it is no likelihood, and falls without end.
  fix:      give loss="cross_entropy", which takes the scores as they are, or end the model with nn.LogSoftmax(#)""",
    ),
    "softmax-before-loss": (
        "a_table_classifier_with_a_softmax_layer",
        """\
error softmax-before-loss: cross_entropy gets probabilities, and takes the softmax of them once more.
  measured: the rows of (# #) are not negative and sum to # within #
  where:    # (Softmax), judging.py:#
  why:      A softmax of a softmax is nearly flat: gradients shrink, the loss cannot come near # and training stalls early.
  fix:      leave the softmax out of the model (and take it where you predict), or give its logarithm to loss="nll"""",
    ),
    "softmax-dim": (
        "softmax_dim",
        """\
error softmax-dim: a softmax is taken over the samples of the batch, not over the classes of each sample.
  measured: logsoftmax over dimension # of (# #), which counts the samples
  where:    # (LogSoftmax), judging.py:#
  why:      A softmax over the wrong dimension mixes the samples of a batch, and the scores of one sample do not sum to #
  fix:      take it over the classes: torch.softmax(x, dim=#)""",
    ),
    "softmax-over-one": (
        "a_softmax_of_a_single_unit",
        """\
error softmax-over-one: a softmax is taken over a single number, and is always #
  measured: softmax over dimension # of (# #), whose size is #
  where:    # (Softmax), judging.py:#
  why:      The softmax of a single number is always #: the output does not depend on the inputs, and nothing is learned.
  fix:      end the model with nn.Linear(..., #) alone, and give loss="bce_with_logits"""",
    ),
    "val-in-train": (
        "two_subsets_that_overlap",
        """\
error val-in-train: the validation is made on data that are trained on.
  measured: # indices are in both
  where:    train, val; judging.py:#
  why:      What is validated on was trained on: the validation says how well it is remembered, not how well it is learned.
  fix:      give val=# which divides train, or data that train does not have""",
    ),
    "frozen-in-optimizer": (
        "images_with_a_frozen_group_to_tune",
        """\
warning frozen-in-optimizer: a group of the optimizer holds nothing but frozen parameters.
  measured: group # of #: none of its # parameters wants a gradient
  where:    body.#weight, body.#bias, body.#weight, body.#bias
  why:      A group of the optimizer whose parameters are all frozen trains nothing: its learning rate does not matter.
  fix:      unfreeze them, model.part.requires_grad_(True), or leave the group out""",
    ),
    "no-gradient": (
        "a_branch_that_is_never_called",
        """\
info no-gradient: some parameters never get a gradient, and are not trained.
  measured: # of # trained parameters in none of # passes; the layer is not used
  where:    of_words.weight
  why:      A parameter that no backward pass reaches is never trained: it is unused, or cut off by .detach() or no_grad().
  fix:      use it in the forward, or leave it out of the model (or freeze it: requires_grad_(False))""",
    ),
    "not-in-optimizer": (
        "autoencoder_with_layers_chosen_by_name",
        """\
warning not-in-optimizer: the optimizer does not hold all of the parameters that are to be trained.
  measured: # of # weights get a gradient and are in no group
  where:    decoder.#weight, decoder.#bias, decoder.#weight, decoder.#bias; judging.py:#
  why:      A weight that the optimizer does not hold stays as it was initialised, though a gradient is computed for it.
  fix:      make it over model.parameters(), or freeze these: requires_grad_(False)""",
    ),
    "hidden-modules": (
        "labels_with_parameters_in_a_tuple",
        """\
error hidden-modules: layers that the loss depends on are not part of the model, and are not trained.
  measured: # tensors get a gradient, and are not in model.parameters()
  where:    scores[#], scores[#], scores[#] of Heads
  why:      A layer in a plain list, dict or tensor attribute is not part of the model: it is neither trained, nor saved, nor moved.
  fix:      keep layers in nn.ModuleList or nn.ModuleDict, and tensors in nn.Parameter""",
    ),
    "integer-inputs": (
        "bytes_into_a_convolution",
        """\
error integer-inputs: integer inputs reach a layer whose weights are float#
  where:    batch # of train; layer '#' (Conv#d); the batch is (uint# (# # # #), int# (#))
  why:      Layers with floating point weights take no integers; and a count or a byte wants to be scaled as well.
  fix:      give X.float() (and scale it), or let an nn.Embedding take the integers""",
    ),
    "raises": (
        "raises",
        """\
error raises: a pass raises KeyError: 'colour'
  where:    epochal: batch # of train; layer 'model' (Raising); the batch is (float# (# #), int# (#))
  why:      A pass over a batch, or an update, raises an error: the training would end there.
  fix:      mend it there""",
    ),
    "all-frozen": (
        "all_frozen",
        """\
error all-frozen: the model has no parameter to train.
  where:    Sequential: all of its # parameters are frozen
  why:      No parameter of the model wants a gradient, so there is nothing to train.
  fix:      set requires_grad_(True) on the parameters that shall be trained""",
    ),
}


def masked(text):
    return re.sub(r"-?\d[\d.,]*(e[+-]\d+)?", "#", text)


@pytest.fixture(autouse=True)
def _rules_may_not_fail(monkeypatch):
    monkeypatch.setattr(finding, "RAISES", True)
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", EXPECTED)
def test_what_is_told(code):
    name, text = EXPECTED[code]
    program = PROGRAMS[name] if name in PROGRAMS else Program(getattr(faulty, name), code)
    found = {one.code: one for one in by_epochal(program).findings}
    assert masked(str(found[code])) == text


def test_every_code_is_told_somewhere():
    assert set(EXPECTED) == set(finding.known())
