// What torch's ATen/functorch/Interpreter.h names of this library, whose headers torch does not
// ship. Declarations alone: nothing here calls the functions that would use them.
#pragma once

#include <string>

namespace nlohmann {

struct json {
  json() = default;
  template <typename T>
  explicit json(const T&);
  static json parse(const std::string&);
  std::string dump() const;
  template <typename T>
  T get() const;
};

}  // namespace nlohmann
