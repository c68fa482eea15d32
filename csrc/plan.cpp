#include "plan.h"

#include <algorithm>
#include <cmath>

#include "diagonal.h"

namespace fastrnn {
namespace {

// Work for which another thread pays: about 10 us of it, against a few to wake the thread.
constexpr double kFlopsPerThread = 1e6;
// A weight is first read or packed, from L3 or memory: that takes as long as so many operations.
constexpr double kFlopsOfReading = 12;
// Where cores are contended: about what a core does in its turn.
constexpr double kContendedFlopsPerThread = 15e7;

// Fewer rows of a thread leave it waiting for the weights: they cost it another one. A layer of so
// many bytes is read from L3 at every step, which takes as long as so many rows.
constexpr int64_t kRowsPerThread = 4, kRowsOfLargeLayer = 17;
constexpr double kLargeBytes = 4 << 20;

// Costs are counted in operations that a product does meanwhile, some 130 a ns on the reference
// machine, and were fitted there to two threads.
constexpr double kStepCost = 1e4;      // of any step
constexpr double kBarrierCost = 15e3;  // of a barrier, for each thread that waits there
constexpr double kExchangeCost = 50;   // of an element that another thread's core has written
constexpr double kBlockCost = 5e4;     // of a block on the diagonal
constexpr double kLstmCost = 250, kElmanCost = 100;  // of a hidden unit's activations

// Where cores are distant, barriers and exchanges cost so many times as much, and there is more.
constexpr double kDistance = 5;
constexpr double kDistantStepCost = 3e4;      // of a step whose rows are divided
constexpr double kDistantBlockCost = 6e5;     // in kBlockCost's place
constexpr double kDistantKeptCost = 80;       // of an element kept for the backward pass
constexpr double kDistantGradientCost = 150;  // of one that all threads read for weights' gradients
constexpr double kDistantReadCost = 125;      // of one that forward kept and one thread wrote

// A member of a diagonal reads the weights of all layers in turn. Where L2 cannot hold so many
// bytes of them, its blocks take longer by that factor.
constexpr int64_t kDiagonalBytes = 768 << 10;
constexpr double kDiagonalMisses = 1.25;

double barrier_cost(const Stack& stack) { return kBarrierCost * (stack.distant ? kDistance : 1); }
double exchange_cost(const Stack& stack) { return kExchangeCost * (stack.distant ? kDistance : 1); }

// A step of the rows of one thread, and of that share of their hidden units.
double step_cost(const Division& division, const Stack& stack, int64_t panels,
                 const StepWork& work) {
  const double rows = std::ceil(double(stack.rows) / stack.steps / division.row_parts);
  double paid = rows < kRowsPerThread ? rows + 1 : rows;
  if (2 * work.products >= kLargeBytes) paid = std::max<double>(paid, kRowsOfLargeLayer);
  const double share = std::ceil(double(panels) / division.unit_parts) / panels;
  const double activations = stack.hidden * (stack.cell == Cell::lstm ? kLstmCost : kElmanCost);
  double cost = kStepCost + paid * (work.products + activations) * share;
  if (stack.distant && division.row_parts > 1) cost += kDistantStepCost;
  if (division.unit_parts == 1) return cost;
  return cost + barrier_cost(stack) * division.unit_parts * work.barriers +
         exchange_cost(stack) * rows * work.exchanged;
}

// A layer, all steps. Threads that divide rows read the weights that the others have packed.
double layer_cost(const Division& division, const Stack& stack, int64_t panels,
                  const StepWork& work) {
  const double steps = stack.steps * step_cost(division, stack, panels, work);
  const double of_others = work.products / 2 * (division.row_parts - 1) / division.row_parts;
  return steps + exchange_cost(stack) * of_others;
}

// Threads for so many weights, each in so many operations; at most torch's.
int thread_count(const Stack& stack, double weights, double flops_each) {
  if (at::in_parallel_region()) return 1;
  const double most = at::get_num_threads();
  const double flops = weights * (flops_each + kFlopsOfReading);
  if (!stack.contended) return static_cast<int>(std::clamp(flops / kFlopsPerThread, 1., most));
  const double rows = stack.batch * stack.directions;  // all that is divided then
  const double useful = std::min(flops / kContendedFlopsPerThread, rows);
  return static_cast<int>(std::clamp(useful, 1., most));
}

// Where cores are distant: of one thread, and even numbers of them (directions are two), and as
// many as that, what costs least.
template <typename Cost>
int least_costly(int threads, const Stack& stack, const Cost& cost) {
  if (!stack.distant || stack.contended || stack.steps == 1) return threads;
  const auto total = [&](int count) { return cost(count) + (count > 1 ? kFlopsPerThread : 0); };
  int best = threads;
  for (int fewer = threads - 1; fewer > 0; --fewer) {
    if (fewer > 1 && fewer % 2 == 1) continue;
    if (total(fewer) <= total(best)) best = fewer;
  }
  return best;
}

// See forward_diagonal. work: of a step of a layer. flops_each: of a weight in all steps.
int diagonal_threads(const Stack& stack, int threads, int64_t panels, int64_t weight_bytes,
                     const StepWork& work, double flops_each) {
  if (stack.layers == 1 || stack.directions == 2 || stack.drops_after(0) || stack.contended) {
    return 0;
  }
  const int members = static_cast<int>(std::min<int64_t>(
      stack.layers, thread_count(stack, work.products / 2 * stack.layers, flops_each)));
  if (members == 1 || (threads > 1 && stack.batch >= kRowsPerThread * threads)) return 0;
  const double blocks = std::ceil(double(stack.steps) / kDiagonalSteps);
  double block = stack.distant ? kDistantBlockCost : kBlockCost;
  block += kDiagonalSteps * step_cost({1, 1, 1}, stack, panels, work);
  if (weight_bytes > kDiagonalBytes) block *= kDiagonalMisses;
  // Fewer layers than members run at its ends, and no layer ends before it has passed them all.
  const double diagonal =
      block * std::max(stack.layers * blocks / members + members - 1, blocks + stack.layers - 1);
  const Division division = divide_layer(threads, stack, 1, panels, work);
  const double in_turn = stack.layers * layer_cost(division, stack, panels, work);
  return diagonal < in_turn ? members : 0;
}

}  // namespace

int forward_threads(const Stack& stack, int64_t panels, bool training) {
  const double weights = stack.directions * stack.gates() * (stack.input + stack.width);
  const int threads = thread_count(stack, weights, 2. * stack.rows);
  const StepWork work = forward_work(stack);
  const double kept = training ? kDistantKeptCost * stack.reserve_size() / stack.layers : 0;
  return least_costly(threads, stack, [&](int count) {
    const Division division = divide_layer(count, stack, stack.directions, panels, work);
    const double directions = stack.directions / division.direction_groups;
    return directions * layer_cost(division, stack, panels, work) + (count > 1 ? kept : 0);
  });
}

int backward_threads(const Stack& stack, int64_t panels, int64_t directions) {
  const double weights = directions * stack.gates() * (stack.input + stack.width);
  const int threads = thread_count(stack, weights, 4. * stack.rows);
  const StepWork work = backward_work(stack);
  const double rows = stack.rows, read = stack.input + stack.width;  // of each row
  // dx, and the gradients of the weights.
  const double products = 2 * rows * stack.gates() * (stack.input + read);
  const double exchanged = kDistantGradientCost * rows * (stack.gates() + read);
  // Half of what one thread has kept is another's to read where directions are side by side.
  double fetched = 0;
  if (stack.distant && directions == 2 && forward_threads(stack, panels, true) == 1) {
    fetched =
        kDistantStepCost * stack.steps + kDistantReadCost * stack.reserve_size() / stack.layers;
  }
  return least_costly(threads, stack, [&](int count) {
    const Division division = divide_layer(count, stack, directions, panels, work);
    const int together = count / division.direction_groups;
    const double direction = layer_cost(division, stack, panels, work) + products / together +
                             (together > 1 ? exchanged : 0);
    return direction * directions / division.direction_groups +
           (division.direction_groups == 2 ? fetched : 0);
  });
}

Division divide_layer(int threads, const Stack& stack, int64_t directions, int64_t panels,
                      const StepWork& work) {
  if (threads == 1) return {1, 1, 1};
  // One step without a projection needs no barrier, and each weight is then one thread's to pack.
  const bool free_barrier = stack.steps == 1 && !stack.projected;
  if (directions == 2 && threads % 2 == 0) {
    Division division = divide_layer(threads / 2, stack, 1, panels, work);
    division.direction_groups = 2;
    return division;
  }
  const Division rows = {1, static_cast<int>(std::min<int64_t>(threads, stack.batch)), 1};
  if (work.barriers == 0) return rows;
  if (free_barrier) return panels >= threads ? Division{1, 1, threads} : rows;
  if (stack.contended) return rows;
  // A thread more saves ever less work, and makes every barrier longer.
  const int64_t useful =
      std::max(1., std::sqrt(step_cost({1, 1, 1}, stack, panels, work) / barrier_cost(stack)));
  const Division units = {1, 1, static_cast<int>(std::min({int64_t{threads}, panels, useful}))};
  const auto cost = [&](const Division& division) {
    return layer_cost(division, stack, panels, work);
  };
  return cost(units) < cost(rows) ? units : rows;
}

StepWork forward_work(const Stack& stack) {
  double inputs = 0;
  for (int64_t layer = 0; layer < stack.layers; ++layer) inputs += stack.layer_input(layer);
  double weights = stack.gates() * (inputs / stack.layers + stack.width);
  if (!stack.projected) return {2 * weights, stack.hidden, 1};
  weights += static_cast<double>(stack.width) * stack.hidden;
  return {2 * weights, stack.hidden + stack.width, 2};
}

StepWork backward_work(const Stack& stack) {
  return {2. * stack.gates() * stack.width, stack.gates(), stack.projected ? 0 : 1};
}

int forward_diagonal(const Stack& stack, int threads, int64_t panels, int64_t weight_bytes) {
  return diagonal_threads(stack, threads, panels, weight_bytes, forward_work(stack),
                          2. * stack.rows);
}

int backward_diagonal(const Stack& stack, int threads, int64_t panels, int64_t weight_bytes) {
  StepWork work = backward_work(stack);
  work.products += 2. * stack.gates() * stack.width;  // of dx
  return diagonal_threads(stack, threads, panels, weight_bytes, work, 4. * stack.rows);
}

std::pair<int64_t, int64_t> split_rows(const Stack& stack, int parts, int part) {
  if (!stack.packed) return {stack.batch * part / parts, stack.batch * (part + 1) / parts};
  std::pair<int64_t, int64_t> found;
  for_packed_ranges(stack, parts, [&](int64_t begin, int64_t end) {
    if (part-- == 0) found = {begin, end};
  });
  return found;
}

void GroupBarrier::wait(void* self) {
  auto* group = static_cast<GroupBarrier*>(self);
  group->barrier.wait(group->size);
}

}  // namespace fastrnn
