// group_fc_loss on a CPU: one pass over the weight, forward and backward.
//
// A block is a range of a group's classes whose weight fits the L2 cache of a core. One thread takes it through
//
//     z  = h W + bias -> loss, dz -> dW = h^T dz, written once -> dh += dz W^T, dbias = sum_b dz
//
// so W is read from memory once, and the logits never leave the thread's own scratch. Consecutive blocks make a slot, a
// function of the shape alone; a slot is one thread's, in order, with its own sums of the loss and of the dh of at most
// two groups that it shares with its neighbours. The slots' sums are added in their order: the same bits for any number
// of threads. 16-bit tensors are widened block by block, and rounded when they are written.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "class_loss_rows.h"
#include "pages.h"

namespace mlhead {
namespace {

constexpr int64_t kWeightBytes = 256 << 10;  // of a block's weight: half of a core's L2, as a rule
constexpr int64_t kLogitBytes = 512 << 10;
constexpr int64_t kSlots = 64;
constexpr int64_t kSumBytes = 16 << 20;  // of all slots' shared dh, unless that leaves fewer than kFewestSlots
constexpr int64_t kFewestSlots = 8;

struct Block {
  int64_t g, j, n;  // group, first column, columns
};

struct Pass {
  enum class Kind { loss, statistics, gradients } kind;
  LossOptions options;
  double factor;
  const void* statistics = nullptr;  // softmax: (B, 4), finished
  void *dh = nullptr, *dweight = nullptr, *dbias = nullptr;
  int64_t dw_g = 0, dw_e = 0, dw_j = 0;  // strides of dweight
};

int64_t block_columns(const GroupFc& f, int64_t size) {
  int64_t n = std::max<int64_t>(64, kWeightBytes / (size * std::max<int64_t>(f.E, 1)));
  n = std::min(n, std::max<int64_t>(16, kLogitBytes / (size * std::max<int64_t>(f.B, 1))));
  return std::min(std::min<int64_t>(n, 2048) / 16 * 16, std::max<int64_t>(f.J, 1));
}

std::vector<Block> plan(const GroupFc& f, int64_t size) {
  std::vector<Block> blocks;
  const int64_t columns = block_columns(f, size);
  for (int64_t g = 0; g < f.groups(); ++g) {
    const int64_t mine = f.classes_of(g), parts = (mine + columns - 1) / columns;
    const int64_t step = (((mine + parts - 1) / parts) + 15) / 16 * 16;  // of equal width, in whole registers
    for (int64_t j = 0; j < mine; j += step) blocks.push_back({g, j, std::min(step, mine - j)});
  }
  return blocks;
}

// What a slot has of its own, summed up after all are done.
template <typename T>
struct SlotSums {
  std::vector<double> rows;      // (B), or (B, 4) statistics
  int64_t groups[2] = {-1, -1};  // whose dh is not all this slot's
  std::vector<T> dh[2];          // (B, E) each
};

template <typename S>
class Runner {
  using T = typename Accumulate<S>::type;
  static constexpr Dtype kSum = std::is_same<T, double>::value ? Dtype::f64 : Dtype::f32;
  static constexpr bool kWide = std::is_same<S, T>::value;

 public:
  Runner(const GroupFc& f, const LossCall& call, const Pass& pass)
      : f_(f), call_(call), pass_(pass), k_(kernels()), blocks_(plan(f, int64_t(sizeof(T)))) {
    const int64_t each = 2 * f.B * f.E * int64_t(sizeof(T));
    const int64_t most = pass.dh ? std::clamp(kSumBytes / std::max<int64_t>(each, 1), kFewestSlots, kSlots) : kSlots;
    slots_ = std::min<int64_t>(most, int64_t(blocks_.size()));
    for (const Block& b : blocks_) widest_ = std::max(widest_, b.n);
  }

  // Adds the losses of all rows to `rows` (B), or writes their statistics (B, 4).
  void run(T* rows) {
    const bool statistics = pass_.kind == Pass::Kind::statistics;
    const int64_t per_row = statistics ? 4 : 1;
    std::vector<SlotSums<T>> sums(static_cast<size_t>(slots_));
    const auto range = [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) run_slot(slot, sums[size_t(slot)]);
    };
    const double work = double(f_.B) * double(f_.E) * double(f_.C);
    if (slots_ > 1 && work > 1 << 18)
      torch::stable::parallel_for(0, slots_, 1, range);
    else
      range(0, slots_);
    for (int64_t b = 0; b < f_.B; ++b) {
      double total[4] = {statistics ? -std::numeric_limits<double>::infinity() : 0, 0, 0, 0};
      for (const SlotSums<T>& s : sums) {
        const double* const more = s.rows.data() + b * per_row;
        statistics ? merge_statistics(total, more) : void(total[0] += more[0]);
      }
      for (int64_t i = 0; i < per_row; ++i) rows[b * per_row + i] = T(total[i]);
    }
    if (pass_.dh) finish_dh(sums);
    if (pass_.dweight) clear_classless();
  }

 private:
  int64_t first_block(int64_t slot) const { return int64_t(blocks_.size()) * slot / slots_; }

  void run_slot(int64_t slot, SlotSums<T>& sums) {
    const int64_t B = f_.B, E = f_.E, n = widest_, begin = first_block(slot), end = first_block(slot + 1);
    const bool statistics = pass_.kind == Pass::Kind::statistics;
    sums.rows.assign(size_t(B * (statistics ? 4 : 1)), 0.0);
    if (statistics)
      for (int64_t b = 0; b < B; ++b) sums.rows[size_t(4 * b)] = -std::numeric_limits<double>::infinity();
    // z, the block's bias and targets, dh of a group, and of 16-bit tensors the widened h, weight and its gradient.
    const auto rounded = [](int64_t count) { return (count + 15) / 16 * 16; };
    const int64_t wide_h = kWide ? 0 : rounded(B * E), wide_w = kWide ? 0 : rounded(n * E);
    T* memory = static_cast<T*>(thread_scratch(
        (rounded(B * n) + 2 * rounded(n) + rounded(B * E) + wide_h + 2 * wide_w) * int64_t(sizeof(T)), kLossScratch));
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + rounded(count)); };
    T* const z = take(B * n);
    T* const rows = take(2 * n);
    T* const dh = take(B * E);
    T* const h = kWide ? nullptr : take(B * E);
    T* const weight = kWide ? nullptr : take(n * E);
    T* const dweight = kWide ? nullptr : take(n * E);

    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks_[size_t(i)];
      const bool new_group = i == begin || blocks_[size_t(i - 1)].g != block.g;
      const bool last_here = i + 1 == end || blocks_[size_t(i + 1)].g != block.g;
      const Product p = product_of(block, new_group, h, weight, dweight);
      gemm({kSum, B, block.n, E, p.h, p.h_b, p.h_e, p.w, p.w_e, p.w_j, z, block.n, 1, nullptr});
      run_rows(block, z, rows, sums);
      if (pass_.kind != Pass::Kind::gradients) continue;
      if (pass_.dweight) {
        gemm({kSum, E, block.n, B, p.h, p.h_e, p.h_b, z, block.n, 1, p.dw, p.dw_e, p.dw_j, nullptr});
        if constexpr (!kWide) write_dweight(block, p);
      }
      if (pass_.dbias) write_dbias(block, z, rows);
      if (pass_.dh) {
        // Whichever of dh and its transpose reads the weight along its contiguous axis.
        if (p.w_j == 1)
          gemm({kSum, E, B, block.n, p.w, p.w_e, 1, z, 1, block.n, dh, B, 1, nullptr, !new_group});
        else
          gemm({kSum, B, E, block.n, z, block.n, 1, p.w, p.w_j, p.w_e, dh, E, 1, nullptr, !new_group});
        if (last_here) give_dh(begin, i, dh, p.w_j == 1, sums);
      }
    }
  }

  // The operands of a block's products, all of T.
  struct Product {
    const T *h, *w;
    int64_t h_b, h_e, w_e, w_j;
    T* dw;
    int64_t dw_e, dw_j;
  };

  Product product_of(const Block& block, bool new_group, T* h, T* weight, T* dweight) const {
    const S* const from_h = static_cast<const S*>(f_.h) + block.g * f_.h_g;
    const S* const from_w = static_cast<const S*>(f_.weight) + block.g * f_.w_g + block.j * f_.w_j;
    if constexpr (kWide) {
      T* const to =
          pass_.dweight ? static_cast<T*>(pass_.dweight) + block.g * pass_.dw_g + block.j * pass_.dw_j : nullptr;
      return {from_h, from_w, f_.h_b, f_.h_e, f_.w_e, f_.w_j, to, pass_.dw_e, pass_.dw_j};
    } else {
      if (new_group)
        for (int64_t b = 0; b < f_.B; ++b) widen(from_h + b * f_.h_b, f_.h_e, f_.E, h + b * f_.E);
      if (f_.w_e == 1 && f_.w_j != 1) {  // along the axis that is contiguous
        for (int64_t j = 0; j < block.n; ++j) widen(from_w + j * f_.w_j, 1, f_.E, weight + j * f_.E);
        return {h, weight, f_.E, 1, 1, f_.E, dweight, 1, f_.E};
      }
      for (int64_t e = 0; e < f_.E; ++e) widen(from_w + e * f_.w_e, f_.w_j, block.n, weight + e * block.n);
      return {h, weight, f_.E, 1, block.n, 1, dweight, block.n, 1};
    }
  }

  void gemm(const Gemm& g) const {
    if (g.M == 0 || g.N == 0) return;
    const Plan plan = plan_gemm(g, k_.lanes(kSum), kSlots);
    for (int64_t tile = 0; tile < plan.tiles_m * plan.tiles_n; ++tile) k_.run_tile[int(kSum)](g, plan, tile);
  }

  void run_rows(const Block& block, T* z, T* scratch, SlotSums<T>& sums) const {
    const LossBlock<T> rows(call_, pass_.options, block.g * f_.J + block.j, block.n, scratch);
    const bool statistics = pass_.kind == Pass::Kind::statistics;
    const auto kernel = statistics ? k_.softmax_row[int(kSum)] : k_.loss_row[int(kSum)];
    for (int64_t b = 0; b < f_.B; ++b) {
      LossRow row{};
      double* const mine = sums.rows.data() + b * (statistics ? 4 : 1);
      const double weight = rows.weight_of(b);
      if (statistics) {
        std::copy_n(mine, 4, row.statistics);
      } else {
        row.factor = pass_.factor * weight, row.need_dz = pass_.kind == Pass::Kind::gradients;
        if (pass_.statistics) {
          const T* const s = static_cast<const T*>(pass_.statistics) + 4 * b;
          row.lse = double(s[0]) + std::log(double(s[1])), row.total = double(s[3]);
        }
      }
      rows.run(kernel, row, b, z + b * block.n);
      if (statistics)
        std::copy_n(row.statistics, 4, mine);
      else
        mine[0] += row.loss * weight;
    }
  }

  void write_dweight(const Block& block, const Product& p) const {
    S* const to = static_cast<S*>(pass_.dweight) + block.g * pass_.dw_g + block.j * pass_.dw_j;
    if (p.dw_e == 1) {
      for (int64_t j = 0; j < block.n; ++j)
        for (int64_t e = 0; e < f_.E; ++e) store_scalar(to + e * pass_.dw_e + j * pass_.dw_j, p.dw[j * p.dw_j + e]);
    } else {
      for (int64_t e = 0; e < f_.E; ++e)
        for (int64_t j = 0; j < block.n; ++j) store_scalar(to + e * pass_.dw_e + j * pass_.dw_j, p.dw[e * p.dw_e + j]);
    }
  }

  void write_dbias(const Block& block, const T* z, T* sum) const {
    k_.column_sum[int(kSum)](z, f_.B, block.n, block.n, 1, sum);
    S* const to = static_cast<S*>(pass_.dbias) + block.g * f_.J + block.j;
    for (int64_t j = 0; j < block.n; ++j) store_scalar(to + j, sum[j]);
  }

  // A group's dh, (E, B) or (B, E), goes to its place if all of the group's blocks were this slot's.
  void give_dh(int64_t begin, int64_t last, const T* dh, bool transposed, SlotSums<T>& sums) const {
    const int64_t g = blocks_[size_t(last)].g, B = f_.B, E = f_.E;
    int64_t from = last;
    while (from > begin && blocks_[size_t(from - 1)].g == g) --from;
    const bool all_of_it = (from == 0 || blocks_[size_t(from - 1)].g != g) &&
                           (last + 1 == int64_t(blocks_.size()) || blocks_[size_t(last + 1)].g != g);
    const int64_t row = transposed ? 1 : E, column = transposed ? B : 1;
    if (all_of_it) {
      S* const to = static_cast<S*>(pass_.dh) + g * E;
      for (int64_t b = 0; b < B; ++b)
        for (int64_t e = 0; e < E; ++e) store_scalar(to + b * f_.G * E + e, dh[b * row + e * column]);
      return;
    }
    const int which = sums.groups[0] < 0 ? 0 : 1;
    sums.groups[which] = g;
    sums.dh[which].resize(size_t(B * E));
    for (int64_t b = 0; b < B; ++b)
      for (int64_t e = 0; e < E; ++e) sums.dh[which][size_t(b * E + e)] = dh[b * row + e * column];
  }

  // Adds up the dh of the groups that several slots had a part in, slot after slot.
  void finish_dh(std::vector<SlotSums<T>>& sums) const {
    const int64_t B = f_.B, E = f_.E;
    std::vector<T>* total = nullptr;
    int64_t group = -1;
    const auto finish = [&] {
      if (!total) return;
      S* const to = static_cast<S*>(pass_.dh) + group * E;
      for (int64_t b = 0; b < B; ++b)
        for (int64_t e = 0; e < E; ++e) store_scalar(to + b * f_.G * E + e, (*total)[size_t(b * E + e)]);
      total = nullptr;
    };
    for (SlotSums<T>& s : sums)
      for (int which = 0; which < 2; ++which) {
        if (s.groups[which] < 0) continue;
        if (s.groups[which] != group) {
          finish();
          group = s.groups[which], total = &s.dh[which];
          continue;
        }
        for (size_t i = 0; i < total->size(); ++i) (*total)[i] += s.dh[which][i];
      }
    finish();
    for (int64_t g = f_.groups(); g < f_.G; ++g)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t e = 0; e < E; ++e) store_scalar(static_cast<S*>(pass_.dh) + (b * f_.G + g) * E + e, T(0));
  }

  // The gradient of weight that belongs to no class.
  void clear_classless() const {
    for (int64_t g = f_.C / std::max<int64_t>(f_.J, 1); g < f_.G; ++g)
      for (int64_t e = 0; e < f_.E; ++e)
        for (int64_t j = f_.classes_of(g); j < f_.J; ++j)
          store_scalar(static_cast<S*>(pass_.dweight) + g * pass_.dw_g + e * pass_.dw_e + j * pass_.dw_j, T(0));
  }

  const GroupFc& f_;
  const LossCall& call_;
  const Pass& pass_;
  const Kernels& k_;
  std::vector<Block> blocks_;
  int64_t slots_ = 0, widest_ = 0;
};

// What is written, of the dtype and the device of h, or null.
void* written(const char* where, const char* argument, const std::optional<Tensor>& t, const Tensor& h,
              const char* letters, const Shape& want, bool contiguous) {
  if (!t.has_value()) return nullptr;
  check_like_h(where, argument, *t, h);
  check_shape(where, argument, shape_of(*t), letters, want);
  if (contiguous && !t->is_contiguous()) fail(where, argument, "contiguous", "other strides");
  return t->mutable_data_ptr();
}

void group_fc_loss_pass_cpu(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias,
                            int64_t num_classes, const Tensor& targets, const std::optional<Tensor>& offsets,
                            const std::optional<Tensor>& values, const std::optional<Tensor>& class_weight,
                            const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& sample_weight,
                            int64_t loss, double gamma_neg, double gamma_pos, double margin, double eps,
                            bool detach_focal, double label_smoothing, double factor, const std::optional<Tensor>& dout,
                            const std::optional<Tensor>& statistics, const Tensor& rows,
                            const std::optional<Tensor>& dh, const std::optional<Tensor>& dweight,
                            const std::optional<Tensor>& dbias) {
  const char* where = "group_fc_loss_pass";
  const GroupFc f(where, h, weight, num_classes);
  LossCall call(where, h, bias, 0, f.J, num_classes, targets, offsets, values, class_weight, f.B);
  call.pos_weight = call.per_class("pos_weight", pos_weight, h);
  call.take_sample_weight(sample_weight, h);
  Pass pass{};
  pass.options = {
      LossCall::loss_of(where, loss), gamma_neg, gamma_pos, margin, eps, detach_focal, label_smoothing, num_classes};
  if (dout.has_value()) {
    const void* const d = call.scalar("dout", *dout, h);
    factor *= f.dtype == Dtype::f64 ? *static_cast<const double*>(d) : double(*static_cast<const float*>(d));
  }
  pass.factor = factor;
  pass.dh = written(where, "dh", dh, h, "(B, G, E)", {f.B, f.G, f.E}, true);
  pass.dweight = written(where, "dweight", dweight, h, "(G, E, J)", {f.G, f.E, f.J}, false);
  pass.dbias = written(where, "dbias", dbias, h, "(C,)", {f.C}, true);
  if (pass.dweight) {
    const auto strides = dweight->strides();
    pass.dw_g = strides[0], pass.dw_e = strides[1], pass.dw_j = strides[2];
    advise_huge_pages(pass.dweight, dweight->numel() * element_size(f.dtype));
  }
  const bool softmax = pass.options.loss == Loss::softmax;
  if (statistics.has_value()) pass.statistics = call.written("statistics", *statistics, h, "(B, 4)", {f.B, 4});
  const bool gradients = pass.dh || pass.dweight || pass.dbias;
  const bool given = statistics.has_value();  // those of an empty batch have no address
  pass.kind = gradients ? Pass::Kind::gradients : softmax && !given ? Pass::Kind::statistics : Pass::Kind::loss;
  if (gradients && softmax && !given) fail(where, "statistics", "given for softmax's gradients", "none");
  const Shape shape = pass.kind == Pass::Kind::statistics ? Shape{f.B, 4} : Shape{f.B};
  void* const to = call.written("rows", rows, h, "(B,) or (B, 4)", shape);
  switch (f.dtype) {
    case Dtype::f32: return Runner<float>(f, call, pass).run(static_cast<float*>(to));
    case Dtype::f64: return Runner<double>(f, call, pass).run(static_cast<double*>(to));
    case Dtype::f16: return Runner<Half>(f, call, pass).run(static_cast<float*>(to));
    case Dtype::bf16: return Runner<BFloat16>(f, call, pass).run(static_cast<float*>(to));
  }
}

}  // namespace
}  // namespace mlhead

STABLE_TORCH_LIBRARY_FRAGMENT(mlhead_C, m) {
  // The losses of all rows (B,) and the gradients that have a tensor; for softmax without `statistics` those (B, 4).
  m.def(
      "group_fc_loss_pass(Tensor h, Tensor weight, Tensor? bias, int num_classes, Tensor targets, Tensor? offsets, "
      "Tensor? values, Tensor? class_weight, Tensor? pos_weight, Tensor? sample_weight, int loss, float gamma_neg, "
      "float gamma_pos, float margin, float eps, bool detach_focal, float label_smoothing, float factor, Tensor? dout, "
      "Tensor? statistics, Tensor(a!) rows, Tensor(b!)? dh, Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CPU, m) {
  m.impl("group_fc_loss_pass", TORCH_BOX(&mlhead::group_fc_loss_pass_cpu));
}
