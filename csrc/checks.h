// Argument checks with the project's one message form:
//
//     group_fc: weight must be (G, E, J) = (100, 768, 97), got (100, 512, 97)
//
// std::invalid_argument reaches Python as ValueError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlhead {

using Shape = std::vector<int64_t>;

inline std::string to_text(const Shape& shape) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << (shape.size() == 1 ? ",)" : ")");
  return out.str();
}

[[noreturn]] inline void fail(const char* where, const char* argument, const std::string& must,
                              const std::string& got) {
  throw std::invalid_argument(std::string(where) + ": " + argument + " must be " + must + ", got " + got);
}

// As many axes as `letters`, e.g. "(B, G, E)", names.
inline void check_ndim(const char* where, const char* argument, const Shape& got, const char* letters, size_t ndim) {
  if (got.size() != ndim) fail(where, argument, letters, to_text(got));
}

inline void check_shape(const char* where, const char* argument, const Shape& got, const char* letters,
                        const Shape& want) {
  if (got != want) fail(where, argument, std::string(letters) + " = " + to_text(want), to_text(got));
}

inline void check_classes(const char* where, int64_t num_classes, int64_t groups, int64_t per_group) {
  if (num_classes < 0 || num_classes > groups * per_group)
    fail(where, "num_classes", "in [0, G * J] = [0, " + std::to_string(groups * per_group) + "]",
         std::to_string(num_classes));
}

inline void check_equal(const char* where, const char* argument, const std::string& got, const std::string& want,
                        const char* like) {
  if (got != want) fail(where, argument, want + " like " + like, got);
}

}  // namespace mlhead
